//! Msgpack, read from a slice one value at a time. What it refuses is what msgspec refuses, so that both decoders call
//! the same payloads broken.

/// How deep values may nest in a value that is skipped. Skipping recurses, and a payload must not choose how far.
pub const MAX_DEPTH: u32 = 256;

/// Arrays in a key with more items than this may hold no arrays: msgspec makes lists of those, not tuples.
const LONG_KEY: usize = 16;

/// A year-1 and a year-9999 second: the timestamps that Python's calendar knows, and so msgspec.
const TIMESTAMPS: std::ops::RangeInclusive<i64> = -62_135_596_800..=253_402_300_799;

/// Why bytes are no msgpack.
// As wide as the values in whose place results hold it: the compiler copies results of mixed layout in pieces that the
// processor has to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Broken {
    Truncated,
    Trailing,
    Opcode,
    Text,
    Timestamp,
    Key,
    Depth,
}

impl Broken {
    pub const fn text(self) -> &'static str {
        match self {
            Self::Truncated => "input was truncated",
            Self::Trailing => "bytes follow the value",
            Self::Opcode => "invalid opcode",
            Self::Text => "a string is not UTF-8",
            Self::Timestamp => "invalid timestamp",
            Self::Key => "a map key cannot be hashed",
            Self::Depth => "nested too deeply",
        }
    }
}

/// One value, or the head of one: the items of arrays and maps follow it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    Nil,
    False,
    True,
    Uint(u64),
    /// Below zero.
    Negative(i64),
    Float(f64),
    Text(&'a str),
    Bytes(&'a [u8]),
    Array(usize),
    Map(usize),
    Timestamp,
    Ext,
}

/// Sizes of the values that are complete with a fixed number of bytes and cannot be malformed, else 0.
const FIXED: [u8; 256] = {
    let mut sizes = [0; 256];
    let mut tag = 0;
    while tag < 256 {
        sizes[tag] = match tag {
            0x00..=0x7f | 0xe0..=0xff | 0xc0 | 0xc2 | 0xc3 => 1,
            0xcc | 0xd0 => 2,
            0xcd | 0xd1 => 3,
            0xca | 0xce | 0xd2 => 5,
            0xcb | 0xcf | 0xd3 => 9,
            _ => 0,
        };
        tag += 1;
    }
    sizes
};

#[derive(Clone, Copy)]
pub struct Reader<'a> {
    pub rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub const fn finish(&self) -> Result<(), Broken> {
        if self.rest.is_empty() { Ok(()) } else { Err(Broken::Trailing) }
    }

    fn chunk<const N: usize>(&mut self) -> Result<[u8; N], Broken> {
        let (chunk, rest) = self.rest.split_first_chunk().ok_or(Broken::Truncated)?;
        self.rest = rest;
        Ok(*chunk)
    }

    fn bytes(&mut self, len: usize) -> Result<&'a [u8], Broken> {
        let (bytes, rest) = self.rest.split_at_checked(len).ok_or(Broken::Truncated)?;
        self.rest = rest;
        Ok(bytes)
    }

    fn len8(&mut self) -> Result<usize, Broken> {
        Ok(usize::from(u8::from_be_bytes(self.chunk()?)))
    }

    fn len16(&mut self) -> Result<usize, Broken> {
        Ok(usize::from(u16::from_be_bytes(self.chunk()?)))
    }

    fn len32(&mut self) -> Result<usize, Broken> {
        usize::try_from(u32::from_be_bytes(self.chunk()?)).map_err(|_| Broken::Truncated)
    }

    fn text(&mut self, len: usize) -> Result<Value<'a>, Broken> {
        Ok(Value::Text(text(self.bytes(len)?)?))
    }

    /// Every item takes a byte at least, so a length beyond what is left is known to be cut short before anything is
    /// made room for.
    fn array(&self, len: usize) -> Result<Value<'a>, Broken> {
        if len > self.rest.len() { Err(Broken::Truncated) } else { Ok(Value::Array(len)) }
    }

    fn map(&self, len: usize) -> Result<Value<'a>, Broken> {
        if len > self.rest.len() / 2 { Err(Broken::Truncated) } else { Ok(Value::Map(len)) }
    }

    fn ext(&mut self, len: usize) -> Result<Value<'a>, Broken> {
        let [code] = self.chunk()?;
        let data = self.bytes(len)?;
        if code != 0xff {
            return Ok(Value::Ext);
        }
        if is_timestamp(data) { Ok(Value::Timestamp) } else { Err(Broken::Timestamp) }
    }

    pub fn value(&mut self) -> Result<Value<'a>, Broken> {
        let [tag] = self.chunk()?;
        match tag {
            0x00..=0x7f => Ok(Value::Uint(u64::from(tag))),
            0x80..=0x8f => self.map(usize::from(tag & 0x0f)),
            0x90..=0x9f => self.array(usize::from(tag & 0x0f)),
            0xa0..=0xbf => self.text(usize::from(tag & 0x1f)),
            0xc0 => Ok(Value::Nil),
            0xc1 => Err(Broken::Opcode),
            0xc2 => Ok(Value::False),
            0xc3 => Ok(Value::True),
            0xc4 => self.len8().and_then(|len| self.bytes(len)).map(Value::Bytes),
            0xc5 => self.len16().and_then(|len| self.bytes(len)).map(Value::Bytes),
            0xc6 => self.len32().and_then(|len| self.bytes(len)).map(Value::Bytes),
            0xc7 => self.len8().and_then(|len| self.ext(len)),
            0xc8 => self.len16().and_then(|len| self.ext(len)),
            0xc9 => self.len32().and_then(|len| self.ext(len)),
            0xca => Ok(Value::Float(f64::from(f32::from_be_bytes(self.chunk()?)))),
            0xcb => Ok(Value::Float(f64::from_be_bytes(self.chunk()?))),
            0xcc => Ok(Value::Uint(u64::from(u8::from_be_bytes(self.chunk()?)))),
            0xcd => Ok(Value::Uint(u64::from(u16::from_be_bytes(self.chunk()?)))),
            0xce => Ok(Value::Uint(u64::from(u32::from_be_bytes(self.chunk()?)))),
            0xcf => Ok(Value::Uint(u64::from_be_bytes(self.chunk()?))),
            0xd0 => Ok(signed(i64::from(i8::from_be_bytes(self.chunk()?)))),
            0xd1 => Ok(signed(i64::from(i16::from_be_bytes(self.chunk()?)))),
            0xd2 => Ok(signed(i64::from(i32::from_be_bytes(self.chunk()?)))),
            0xd3 => Ok(signed(i64::from_be_bytes(self.chunk()?))),
            0xd4 => self.ext(1),
            0xd5 => self.ext(2),
            0xd6 => self.ext(4),
            0xd7 => self.ext(8),
            0xd8 => self.ext(16),
            0xd9 => self.len8().and_then(|len| self.text(len)),
            0xda => self.len16().and_then(|len| self.text(len)),
            0xdb => self.len32().and_then(|len| self.text(len)),
            0xdc => self.len16().and_then(|len| self.array(len)),
            0xdd => self.len32().and_then(|len| self.array(len)),
            0xde => self.len16().and_then(|len| self.map(len)),
            0xdf => self.len32().and_then(|len| self.map(len)),
            0xe0..=0xff => Ok(Value::Negative(i64::from(tag as i8))),
        }
    }

    /// Reads the next value if it is an unsigned integer of 64 bits, which nearly all hashes are.
    pub fn uint64(&mut self) -> Option<u64> {
        let (&[0xcf, a, b, c, d, e, f, g, h], rest) = self.rest.split_first_chunk()? else {
            return None;
        };
        self.rest = rest;
        Some(u64::from_be_bytes([a, b, c, d, e, f, g, h]))
    }

    /// Reads a map key: the bytes of a string, which the caller must check unless it knows them, or None for a key of
    /// another type.
    pub fn key(&mut self) -> Result<Option<&'a [u8]>, Broken> {
        let mut ahead = *self;
        let [tag] = ahead.chunk()?;
        let len = match tag {
            0xa0..=0xbf => usize::from(tag & 0x1f),
            0xd9 => ahead.len8()?,
            0xda => ahead.len16()?,
            0xdb => ahead.len32()?,
            _ => return self.skip_key(0).map(|()| None),
        };
        let bytes = ahead.bytes(len)?;
        *self = ahead;
        Ok(Some(bytes))
    }

    /// Reads the next value to its end and checks all of it.
    pub fn skip(&mut self) -> Result<(), Broken> {
        self.skip_values(1, 0)
    }

    /// Reads what `value` holds, after its head.
    pub fn skip_inside(&mut self, value: Value) -> Result<(), Broken> {
        self.skip_items(value, 0)
    }

    pub fn skip_many(&mut self, count: usize) -> Result<(), Broken> {
        self.skip_values(count, 0)
    }

    fn skip_values(&mut self, count: usize, depth: u32) -> Result<(), Broken> {
        for _ in 0..count {
            let (&tag, _) = self.rest.split_first().ok_or(Broken::Truncated)?;
            let size = usize::from(FIXED[usize::from(tag)]);
            if size > 0 {
                self.bytes(size)?;
            } else {
                let value = self.value()?;
                self.skip_items(value, depth)?;
            }
        }
        Ok(())
    }

    fn skip_items(&mut self, value: Value, depth: u32) -> Result<(), Broken> {
        match value {
            Value::Array(len) => self.skip_values(len, deeper(depth)?),
            Value::Map(len) => {
                let depth = deeper(depth)?;
                for _ in 0..len {
                    self.skip_key(depth)?;
                    self.skip_values(1, depth)?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Arrays become tuples in a key and can be hashed if all their items can.
    fn skip_key(&mut self, depth: u32) -> Result<(), Broken> {
        match self.value()? {
            Value::Array(len) => {
                let depth = deeper(depth)?;
                for _ in 0..len {
                    if len > LONG_KEY && matches!(self.rest.first(), Some(0x90..=0x9f | 0xdc | 0xdd)) {
                        return Err(Broken::Key);
                    }
                    self.skip_key(depth)?;
                }
                Ok(())
            }
            Value::Map(_) | Value::Ext => Err(Broken::Key),
            _ => Ok(()),
        }
    }
}

pub fn text(bytes: &[u8]) -> Result<&str, Broken> {
    std::str::from_utf8(bytes).map_err(|_| Broken::Text)
}

const fn deeper(depth: u32) -> Result<u32, Broken> {
    if depth < MAX_DEPTH { Ok(depth + 1) } else { Err(Broken::Depth) }
}

const fn signed(value: i64) -> Value<'static> {
    if value < 0 { Value::Negative(value) } else { Value::Uint(value.unsigned_abs()) }
}

/// The three forms of msgpack's timestamp, as far as Python can hold them.
fn is_timestamp(data: &[u8]) -> bool {
    if data.len() == 4 {
        return true;
    }
    if let Ok(packed) = data.try_into().map(u64::from_be_bytes) {
        return packed >> 34 <= 999_999_999;
    }
    let Some((nanos, seconds)) = data.split_first_chunk().map(|(nanos, rest)| (u32::from_be_bytes(*nanos), rest))
    else {
        return false;
    };
    let Ok(seconds) = seconds.try_into().map(i64::from_be_bytes) else {
        return false;
    };
    // the last half microsecond of the year 9999 rounds up to the year 10000
    let most = if seconds == *TIMESTAMPS.end() { 999_999_499 } else { 999_999_999 };
    nanos <= most && TIMESTAMPS.contains(&seconds)
}
