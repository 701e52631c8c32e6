//! A flat hash table that is sorted: rows stand in the order of their keys, with gaps.
//!
//! Keys are uniform 64-bit words (XXH3, or mixed by the caller), so a key's home is simply its share of the range,
//! `key * homes / 2^64`, and growing by a quarter copies the rows in order, from one end to the other. Rows of a crowded
//! place move right, keeping the order; a look-up ends at the first gap or larger key. One cache line answers most
//! look-ups even at a load of 0.8.
//!
//! All words are atomics, so that one writer and any number of readers may work on a table at once; what that means for
//! a reader is `blocks.rs`' business. A value of 0 marks a gap.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// A key of `W` words, a value, nothing else.
#[repr(C)]
pub struct Row<const W: usize> {
    key: [AtomicU64; W],
    value: AtomicU64,
}

impl<const W: usize> Row<W> {
    #[inline]
    fn key(&self) -> [u64; W] {
        std::array::from_fn(|word| self.key[word].load(Ordering::Relaxed))
    }

    #[inline]
    pub fn value(&self) -> u64 {
        self.value.load(Ordering::Acquire)
    }

    /// Changes the value in place. Whatever it points to must be complete.
    #[inline]
    pub fn set_value(&self, value: u64) {
        self.value.store(value, Ordering::Release);
    }

    #[inline]
    fn set(&self, key: [u64; W], value: u64) {
        for (place, word) in self.key.iter().zip(key) {
            place.store(word, Ordering::Relaxed);
        }
        self.set_value(value);
    }
}

/// Where a key is, or where it belongs.
pub enum Place {
    Found(usize),
    Vacant(usize),
}

/// Rows in memory of their own. It does not grow by itself: see `grown`.
pub struct Table<const W: usize> {
    rows: NonNull<Row<W>>,
    homes: usize,
    /// Rows beyond the homes, for what the last ones move right.
    spare: usize,
}

// SAFETY: the rows are owned by the table and consist of atomics only.
unsafe impl<const W: usize> Send for Table<W> {}
// SAFETY: as above; shared access to atomics is what they are for.
unsafe impl<const W: usize> Sync for Table<W> {}

/// Rows beyond the homes, where keys are as uniform as they should be.
fn usual_spare(homes: usize) -> usize {
    (homes / 4).min(64)
}

/// From here on memory comes in pages, and large pages are asked for: a random look-up in small ones costs a page walk.
const PAGED: usize = 1 << 21;

impl<const W: usize> Table<W> {
    /// A table for keys spread over `homes` places.
    pub fn new(homes: usize) -> Self {
        Self::with_spare(homes, usual_spare(homes))
    }

    fn with_spare(homes: usize, spare: usize) -> Self {
        let layout = Self::layout(homes, spare);
        // SAFETY: the layout is not of size zero, as there is at least one row.
        let memory = unsafe { alloc_zeroed(layout) };
        let rows = NonNull::new(memory.cast::<Row<W>>()).unwrap_or_else(|| handle_alloc_error(layout));
        if layout.size() >= PAGED {
            advise_large_pages(memory, layout.size());
        }
        Self { rows, homes, spare }
    }

    fn layout(homes: usize, spare: usize) -> Layout {
        Layout::array::<Row<W>>(homes + spare + 2).expect("a table is never larger than memory")
    }

    /// Rows in memory. The last one is a gap always, the one before it unless `insert` says otherwise.
    #[inline]
    fn count(&self) -> usize {
        self.homes + self.spare + 2
    }

    #[inline]
    fn last(&self) -> usize {
        self.homes + self.spare
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.count() * size_of::<Row<W>>()
    }

    pub fn homes(&self) -> usize {
        self.homes
    }

    #[inline]
    pub fn rows(&self) -> &[Row<W>] {
        // SAFETY: `with_spare` allocated so many rows and zeroed them, which is a valid state of atomics.
        unsafe { std::slice::from_raw_parts(self.rows.as_ptr(), self.count()) }
    }

    #[inline]
    fn home(&self, key: &[u64; W]) -> usize {
        ((u128::from(key[0]) * self.homes as u128) >> 64) as usize
    }

    /// Asks for the cache line of a key ahead of its use.
    #[inline]
    pub fn prefetch(&self, key: &[u64; W]) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let row: *const Row<W> = &self.rows()[self.home(key)];
            // SAFETY: a prefetch never faults, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(row.cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = key;
    }

    /// The value of a key, 0 where it has none.
    #[inline]
    pub fn get(&self, key: [u64; W]) -> u64 {
        // The last row is always a gap, so this ends; a reader that a writer overtakes may run off it, and stops there.
        for row in &self.rows()[self.home(&key)..] {
            let value = row.value();
            if value == 0 {
                return 0;
            }
            let found = row.key();
            if found == key {
                return value;
            }
            if found > key {
                return 0;
            }
        }
        0
    }

    /// Where a key is or belongs. For the writer.
    #[inline]
    pub fn place(&self, key: &[u64; W]) -> Place {
        let rows = self.rows();
        let mut number = self.home(key);
        loop {
            let row = &rows[number];
            if row.value() == 0 {
                return Place::Vacant(number);
            }
            let found = row.key();
            if found == *key {
                return Place::Found(number);
            }
            if found > *key {
                return Place::Vacant(number);
            }
            number += 1;
        }
    }

    /// Says whether `insert` at a vacant place has to move rows.
    #[inline]
    pub fn is_gap(&self, number: usize) -> bool {
        self.rows()[number].value() == 0
    }

    /// Puts a row at the vacant place of its key. Says no when that was the last one with room at the end: the table has to
    /// be replaced before the next.
    #[inline]
    pub fn insert(&self, number: usize, key: [u64; W], value: u64) -> bool {
        let (mut number, mut key, mut value) = (number, key, value);
        loop {
            let row = &self.rows()[number];
            let moved = (row.key(), row.value());
            row.set(key, value);
            if moved.1 == 0 {
                return number < self.last();
            }
            (key, value) = moved;
            number += 1;
        }
    }

    /// Takes a row out and moves those after it back towards their homes.
    pub fn remove(&self, number: usize) {
        let rows = self.rows();
        let mut gap = number;
        loop {
            let next = &rows[gap + 1]; // the last rows are gaps, so there is a next one
            if next.value() == 0 || self.home(&next.key()) > gap {
                break;
            }
            rows[gap].set(next.key(), next.value());
            gap += 1;
        }
        rows[gap].set_value(0);
    }

    /// A copy with another number of homes.
    pub fn resized(&self, homes: usize) -> Self {
        let mut spare = usual_spare(homes);
        loop {
            if let Some(table) = self.copy(homes, spare) {
                return table;
            }
            // Keys that crowd at the end of the range need room there, which more homes would not give.
            spare = 2 * spare + 8;
        }
    }

    /// A copy with more room at the end.
    pub fn with_more_spare(&self) -> Self {
        self.copy(self.homes, 2 * self.spare + 8).expect("a larger table holds what a smaller one did")
    }

    /// None where there is no room for the last rows.
    fn copy(&self, homes: usize, spare: usize) -> Option<Self> {
        let table = Self::with_spare(homes, spare);
        let rows = table.rows();
        let mut next = 0;
        for row in self.rows() {
            let (key, value) = (row.key(), row.value());
            // Gaps are copied too, where the next row may overwrite them: whether a row is a gap cannot be predicted,
            // and a wrong guess costs more than a copy.
            let number = table.home(&key).max(next);
            if number >= table.last() {
                if value == 0 {
                    continue;
                }
                return None;
            }
            rows[number].set(key, value);
            next = if value == 0 { next } else { number + 1 };
        }
        Some(table)
    }

    /// All keys and values, in the order of the keys.
    pub fn iter(&self) -> impl Iterator<Item = ([u64; W], u64)> + '_ {
        self.rows().iter().map(|row| (row.key(), row.value())).filter(|(_, value)| *value != 0)
    }
}

impl<const W: usize> Drop for Table<W> {
    fn drop(&mut self) {
        // SAFETY: allocated in `with_spare` with the same layout; nobody else can refer to the rows of an owned table.
        unsafe { dealloc(self.rows.as_ptr().cast(), Self::layout(self.homes, self.spare)) }
    }
}

#[cfg(target_os = "linux")]
fn advise_large_pages(memory: *mut u8, size: usize) {
    let page = 4096;
    let start = (memory as usize).next_multiple_of(page);
    let end = (memory as usize + size) / page * page;
    // SAFETY: whole pages inside memory that we own; the advice changes no content, and its failure changes nothing.
    unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn advise_large_pages(_: *mut u8, _: usize) {}

/// How many homes a table of `len` rows should have when it was too small or too large: the larger, the less spare room.
pub fn homes_for(len: usize) -> usize {
    match len {
        0..0x1000 => (len * 2).max(8),
        0x1000..0x8000 => len + len / 2 + len / 4,
        _ => len + len / 2 + len / 16,
    }
}

/// Says whether `len` rows are too many for that many homes.
#[inline]
pub fn is_crowded(len: usize, homes: usize) -> bool {
    len * 5 > homes * 4
}

/// Says whether `len` rows are so few that memory should be given back.
#[inline]
pub fn is_sparse(len: usize, homes: usize) -> bool {
    homes > 64 && len * 3 < homes
}

/// A table with one owner that grows and shrinks by itself.
pub struct Map<const W: usize> {
    table: Table<W>,
    len: usize,
}

impl<const W: usize> Default for Map<W> {
    fn default() -> Self {
        Self { table: Table::new(0), len: 0 }
    }
}

impl<const W: usize> Map<W> {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn bytes(&self) -> usize {
        self.table.bytes()
    }

    #[inline]
    pub fn prefetch(&self, key: &[u64; W]) {
        self.table.prefetch(key);
    }

    #[inline]
    pub fn get(&self, key: [u64; W]) -> u64 {
        self.table.get(key)
    }

    /// Makes room for `more` keys at once, so that prefetched rows stay where they are.
    pub fn reserve(&mut self, more: usize) {
        let len = self.len + more;
        if is_crowded(len, self.table.homes()) {
            self.table = self.table.resized(homes_for(len));
        }
    }

    /// Gives the value that a key has already, or 0 and the key has this one now.
    #[inline]
    pub fn insert_or_get(&mut self, key: [u64; W], value: u64) -> u64 {
        loop {
            match self.table.place(&key) {
                Place::Found(number) => return self.table.rows()[number].value(),
                Place::Vacant(_) if is_crowded(self.len + 1, self.table.homes()) => {
                    self.table = self.table.resized(homes_for(self.len + 1));
                }
                Place::Vacant(number) => {
                    self.len += 1;
                    if !self.table.insert(number, key, value) {
                        self.table = self.table.with_more_spare();
                    }
                    return 0;
                }
            }
        }
    }

    /// Takes a key out and gives the value it had, 0 for none.
    pub fn remove(&mut self, key: [u64; W]) -> u64 {
        let Place::Found(number) = self.table.place(&key) else { return 0 };
        let value = self.table.rows()[number].value();
        self.table.remove(number);
        self.len -= 1;
        if is_sparse(self.len, self.table.homes()) {
            self.table = self.table.resized(homes_for(self.len));
        }
        value
    }

    pub fn iter(&self) -> impl Iterator<Item = ([u64; W], u64)> + '_ {
        self.table.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn next(state: &mut u64) -> u64 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state
    }

    /// Against `BTreeMap`, with keys that crowd into few places and keys that spread.
    #[test]
    fn does_what_a_plain_map_does() {
        for spread in [0, 8, 40, 63] {
            let (mut map, mut model, mut state) = (Map::<1>::default(), BTreeMap::new(), 88172645463325252u64);
            for step in 0..12_000u64 {
                let growing = step / 3_000 % 2 == 0;
                let key = (next(&mut state) >> spread).wrapping_mul(if spread == 63 { 1 } else { 0x10001 });
                if next(&mut state) % 4 != u64::from(growing) {
                    let before = model.get(&key).copied().unwrap_or(0);
                    if growing {
                        model.entry(key).or_insert(step + 1);
                        assert_eq!(map.insert_or_get([key], step + 1), before);
                    } else {
                        let victim = model.range(key..).next().map_or(key, |(key, _)| *key);
                        let before = model.remove(&victim).unwrap_or(0);
                        assert_eq!(map.remove([victim]), before);
                    }
                } else {
                    assert_eq!(map.get([key]), model.get(&key).copied().unwrap_or(0));
                }
                assert_eq!(map.len(), model.len());
            }
            let rows: Vec<_> = map.iter().map(|([key], value)| (key, value)).collect();
            assert_eq!(rows, model.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn keys_at_both_ends_of_the_range_have_their_place() {
        let mut map = Map::<2>::default();
        for number in 0..2000u64 {
            assert_eq!(map.insert_or_get([u64::MAX, number], number + 1), 0);
            assert_eq!(map.insert_or_get([0, number], number + 1), 0);
        }
        for number in 0..2000u64 {
            assert_eq!(map.get([u64::MAX, number]), number + 1);
            assert_eq!(map.remove([0, number]), number + 1);
            assert_eq!(map.get([0, number]), 0);
        }
        assert_eq!(map.len(), 2000);
    }

    #[test]
    fn gives_memory_back() {
        let (mut map, mut state) = (Map::<1>::default(), 1u64);
        let keys: Vec<u64> = (0..100_000).map(|_| next(&mut state)).collect();
        for key in &keys {
            map.insert_or_get([*key], 1);
        }
        assert!(map.bytes() < 26 * keys.len());
        for key in &keys[100..] {
            map.remove([*key]);
        }
        assert!(map.bytes() < 16_384);
    }
}
