//! What is written of a source, and read again: little-endian numbers, texts and columns of names and keys.
//!
//! `indexer/sections.py` says the same in Python; the bytes are the same. What is read may be anything.

use crate::events::EngineHash;

/// What is wrong with bytes that were read: for whoever wants to know, never to be acted on.
pub type Flaw = String;

#[derive(Default)]
pub struct Writer {
    pub bytes: Vec<u8>,
}

impl Writer {
    pub fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    pub fn flag(&mut self, value: bool) {
        self.u8(u8::from(value));
    }

    pub fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub fn i64(&mut self, value: i64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub fn i128(&mut self, value: i128) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub fn f64(&mut self, value: f64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub fn count(&mut self, value: usize) {
        self.u64(value as u64);
    }

    pub fn blob(&mut self, value: &[u8]) {
        self.count(value.len());
        self.bytes.extend_from_slice(value);
    }

    pub fn text(&mut self, value: &str) {
        self.blob(value.as_bytes());
    }

    /// A text that may be missing.
    pub fn maybe(&mut self, value: Option<&str>) {
        self.flag(value.is_some());
        if let Some(text) = value {
            self.text(text);
        }
    }

    /// A number that may be missing; -1 says so.
    pub fn group(&mut self, value: Option<u32>) {
        self.i64(value.map_or(-1, i64::from));
    }

    pub fn name(&mut self, name: EngineHash) {
        self.bytes.extend_from_slice(&name.0.to_le_bytes());
    }

    pub fn names(&mut self, names: &[EngineHash]) {
        self.count(names.len());
        for name in names {
            self.name(*name);
        }
    }
}

/// Reads what a `Writer` wrote. Lengths are checked before anything is made of them.
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Says what is wrong, and where.
    pub fn flaw<T>(&self, what: &str) -> Result<T, Flaw> {
        Err(format!("{what} at byte {}", self.at))
    }

    pub fn take(&mut self, len: usize) -> Result<&'a [u8], Flaw> {
        let left = self.bytes.len() - self.at;
        if len > left {
            return self.flaw(&format!("{len} bytes are said to follow, but {left} do"));
        }
        self.at += len;
        Ok(&self.bytes[self.at - len..self.at])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Flaw> {
        Ok(self.take(N)?.try_into().expect("as many as were taken"))
    }

    pub fn u8(&mut self) -> Result<u8, Flaw> {
        Ok(self.array::<1>()?[0])
    }

    pub fn flag(&mut self) -> Result<bool, Flaw> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => self.flaw(&format!("expected 0 or 1, got {other}")),
        }
    }

    pub fn u32(&mut self) -> Result<u32, Flaw> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64, Flaw> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub fn i64(&mut self) -> Result<i64, Flaw> {
        Ok(i64::from_le_bytes(self.array()?))
    }

    pub fn i128(&mut self) -> Result<i128, Flaw> {
        Ok(i128::from_le_bytes(self.array()?))
    }

    /// A number of seconds.
    pub fn f64(&mut self) -> Result<f64, Flaw> {
        let value = f64::from_le_bytes(self.array()?);
        if value.is_finite() { Ok(value) } else { self.flaw("expected a finite number") }
    }

    /// How many rows of `width` bytes follow.
    pub fn count(&mut self, width: usize) -> Result<usize, Flaw> {
        let (count, left) = (self.u64()?, (self.bytes.len() - self.at) as u64);
        if count > left / width as u64 {
            return self.flaw(&format!("{count} rows are said to follow, but {left} bytes do"));
        }
        Ok(count as usize)
    }

    pub fn blob(&mut self) -> Result<&'a [u8], Flaw> {
        let len = self.count(1)?;
        self.take(len)
    }

    pub fn text(&mut self) -> Result<&'a str, Flaw> {
        let bytes = self.blob()?;
        std::str::from_utf8(bytes).or_else(|_| self.flaw("expected text in UTF-8"))
    }

    pub fn maybe(&mut self) -> Result<Option<&'a str>, Flaw> {
        if self.flag()? { self.text().map(Some) } else { Ok(None) }
    }

    pub fn group(&mut self) -> Result<Option<u32>, Flaw> {
        match self.i64()? {
            -1 => Ok(None),
            number => {
                u32::try_from(number).map(Some).or_else(|_| self.flaw(&format!("no number of 32 bits: {number}")))
            }
        }
    }

    /// A block size.
    pub fn size(&mut self) -> Result<u32, Flaw> {
        match self.u32()? {
            0 => self.flaw("a block size of 0"),
            size => Ok(size),
        }
    }

    pub fn name(&mut self) -> Result<EngineHash, Flaw> {
        let name = EngineHash(u128::from_le_bytes(self.array()?));
        match name.as_int() {
            Some(int) if name != EngineHash::from_int(int) => self.flaw("no name of a block"),
            _ => Ok(name),
        }
    }

    pub fn names(&mut self) -> Result<Vec<EngineHash>, Flaw> {
        let count = self.count(16)?;
        (0..count).map(|_| self.name()).collect()
    }

    /// A column of numbers.
    pub fn words(&mut self, count: usize) -> Result<impl Iterator<Item = u64> + use<'a>, Flaw> {
        let bytes = self.take(8 * count)?;
        Ok(bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 of them"))))
    }

    pub fn end(&self) -> Result<(), Flaw> {
        if self.at == self.bytes.len() { Ok(()) } else { self.flaw("more than was expected") }
    }
}
