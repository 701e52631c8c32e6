//! The slots that hold a block, as one word.
//!
//! Up to three slots stand in the word itself, in order. More are a `Set` that all blocks with the same holders share:
//! along a prompt that many pods hold, thousands of blocks have the very same holders, so a set is stored once, and two
//! blocks have the same holders exactly when their words are equal.
//!
//! A set counts the blocks that refer to it. It is found through `Sets`' table, which has a lock of its own, taken only
//! when a set is made or dies; a set whose count reached zero is dead for good. Its memory is freed only when no reader
//! that was at work at that moment is any more (`crossbeam_epoch`), so a word read under a pinned guard can be looked
//! into until the guard is dropped, and no other set can take its address meanwhile.

use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_epoch::Guard;
use hashbrown::HashTable;
use parking_lot::Mutex;
use xxhash_rust::xxh3::xxh3_64;

/// A small number for one (source, incarnation, medium, group, block size).
pub type SlotId = u32;

/// Slots are numbered below this, so that three fit into a word.
pub const MAX_SLOTS: u32 = 1 << BITS;

const BITS: u32 = 20;
const TAG: u64 = 0b11;
const INLINE: usize = 3;

/// Four or more slots that hold the same blocks.
struct Set {
    blocks: AtomicUsize,
    slots: Box<[SlotId]>,
}

impl Set {
    fn bytes(&self) -> usize {
        // the set, its slots, its place in the table
        size_of::<Self>() + size_of_val(&*self.slots) + 3 * size_of::<usize>()
    }
}

/// The slots of a word, in order.
pub struct Slots<'a> {
    inline: [SlotId; INLINE],
    shared: &'a [SlotId],
    count: usize,
}

impl Slots<'_> {
    #[inline]
    pub fn as_slice(&self) -> &[SlotId] {
        if self.count <= INLINE { &self.inline[..self.count] } else { self.shared }
    }
}

/// Reads a word from the table of blocks; 0 is nobody.
#[inline]
pub fn slots_of(word: u64, _guard: &Guard) -> Slots<'_> {
    let count = (word & TAG) as usize;
    if count == 0 && word != 0 {
        // SAFETY: a word with tag 0 is the address of a set that was alive when it was read, see the module; the guard
        // that the result borrows keeps its memory.
        let set = unsafe { &*(word as *const Set) };
        return Slots { inline: [0; INLINE], shared: &set.slots, count: set.slots.len() };
    }
    let mask = u64::from(MAX_SLOTS - 1);
    let inline = std::array::from_fn(|place| (word >> (2 + BITS as usize * place) & mask) as SlotId);
    Slots { inline, shared: &[], count }
}

fn inline_word(slots: &[SlotId]) -> u64 {
    slots
        .iter()
        .enumerate()
        .fold(slots.len() as u64, |word, (place, slot)| word | u64::from(*slot) << (2 + BITS as usize * place))
}

/// The last change of a word, which the next block of a chain mostly repeats.
#[derive(Clone, Copy, Default)]
pub struct Memo {
    before: u64,
    after: u64,
}

/// All sets.
#[derive(Default)]
pub struct Sets {
    table: Mutex<HashTable<usize>>,
    bytes: AtomicUsize,
}

impl Sets {
    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The word with one slot more, None where the slot is in it already.
    ///
    /// The new word is the caller's: it goes into the table of blocks, and then `release` the old one. Not before: a
    /// reader that came later could still find the old word there.
    #[inline]
    pub fn with(&self, word: u64, slot: SlotId, memo: &mut Memo, guard: &Guard) -> Option<u64> {
        if word == 0 {
            return Some(inline_word(&[slot]));
        }
        if word == memo.before && self.acquire(memo.after) {
            return Some(memo.after);
        }
        let before = slots_of(word, guard);
        let slots = before.as_slice();
        let Err(place) = slots.binary_search(&slot) else { return None };
        let mut after = Vec::with_capacity(slots.len() + 1);
        after.extend_from_slice(&slots[..place]);
        after.push(slot);
        after.extend_from_slice(&slots[place..]);
        Some(self.change(word, &after, memo))
    }

    /// The word with one slot less, None where the slot is not in it. As for `with`, `release` the old one afterwards.
    #[inline]
    pub fn without(&self, word: u64, slot: SlotId, memo: &mut Memo, guard: &Guard) -> Option<u64> {
        if word == inline_word(&[slot]) {
            return Some(0);
        }
        if word == 0 {
            return None;
        }
        if word == memo.before && self.acquire(memo.after) {
            return Some(memo.after);
        }
        let before = slots_of(word, guard);
        let slots = before.as_slice();
        let Ok(place) = slots.binary_search(&slot) else { return None };
        let mut after = Vec::with_capacity(slots.len());
        after.extend_from_slice(&slots[..place]);
        after.extend_from_slice(&slots[place + 1..]);
        Some(self.change(word, &after, memo))
    }

    fn change(&self, word: u64, slots: &[SlotId], memo: &mut Memo) -> u64 {
        let after = if slots.len() <= INLINE { inline_word(slots) } else { self.shared(slots) };
        *memo = Memo { before: word, after };
        after
    }

    /// Refers to a set once more; says no where it is dead. A word without a set is always fine.
    #[inline]
    fn acquire(&self, word: u64) -> bool {
        if word & TAG != 0 {
            return true;
        }
        // SAFETY: see `slots_of`: words come from the table of blocks or from a memo, both read under the same guard.
        let set = unsafe { &*(word as *const Set) };
        set.blocks
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |blocks| (blocks > 0).then_some(blocks + 1))
            .is_ok()
    }

    fn shared(&self, slots: &[SlotId]) -> u64 {
        let hash = hash_of(slots);
        let mut table = self.table.lock();
        // SAFETY: addresses in the table are those of sets whose memory is not freed: `release` takes them out first.
        let known = table.find(hash, |address| unsafe { &*(*address as *const Set) }.slots[..] == *slots).copied();
        if let Some(address) = known
            && self.acquire(address as u64)
        {
            return address as u64;
        }
        let set = Box::new(Set { blocks: AtomicUsize::new(1), slots: slots.into() });
        self.bytes.fetch_add(set.bytes(), Ordering::Relaxed);
        let address = Box::into_raw(set) as usize;
        if let Some(dead) = known {
            // whoever let it go waits for the lock to take it out, and will find it gone
            if let Ok(entry) = table.find_entry(hash, |other| *other == dead) {
                entry.remove();
            }
        }
        // SAFETY: as above.
        table.insert_unique(hash, address, |address| hash_of(&unsafe { &*(*address as *const Set) }.slots));
        address as u64
    }

    /// Says that the table of blocks has a word once less.
    #[inline]
    pub fn release(&self, word: u64, guard: &Guard) {
        if word & TAG != 0 || word == 0 {
            return;
        }
        // SAFETY: the caller has a reference, so the set is alive.
        let set = unsafe { &*(word as *const Set) };
        if set.blocks.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        if let Ok(entry) = self.table.lock().find_entry(hash_of(&set.slots), |address| *address as u64 == word) {
            entry.remove();
        }
        self.bytes.fetch_sub(set.bytes(), Ordering::Relaxed);
        // SAFETY: the count reached zero once and never rises from it, so this happens once; the table has the address
        // no longer, and readers that have it are pinned, which is what the deferral waits for.
        unsafe { guard.defer_unchecked(move || drop(Box::from_raw(word as *mut Set))) };
    }
}

impl Drop for Sets {
    fn drop(&mut self) {
        for address in self.table.get_mut().drain() {
            // SAFETY: nobody else is left, and the address is in the table once.
            drop(unsafe { Box::from_raw(address as *mut Set) });
        }
    }
}

fn hash_of(slots: &[SlotId]) -> u64 {
    // SAFETY: any u32 is four valid bytes; the length is that of the slice.
    xxh3_64(unsafe { std::slice::from_raw_parts(slots.as_ptr().cast::<u8>(), size_of_val(slots)) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_epoch::pin;
    use std::collections::BTreeSet;

    #[test]
    fn words_hold_what_was_put_in_and_equal_words_mean_equal_holders() {
        let (sets, mut memo) = (Sets::default(), (Memo::default(), Memo::default()));
        let (mut words, mut models) = (vec![0u64; 40], vec![BTreeSet::new(); 40]);
        let replace = |word: &mut u64, after: Option<u64>, guard: &Guard| {
            if let Some(after) = after {
                sets.release(std::mem::replace(word, after), guard);
            }
        };
        let mut state = 99u64;
        for _ in 0..40_000 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let (number, slot) = ((state >> 33) as usize % 40, (state >> 45) as u32 % 12 * 80_000);
            let guard = &pin();
            // a memo belongs to one slot
            if state >> 62 != 0 {
                memo.0 = Memo::default();
                let after = sets.with(words[number], slot, &mut memo.0, guard);
                assert_eq!(after.is_some(), models[number].insert(slot));
                replace(&mut words[number], after, guard);
            } else {
                memo.1 = Memo::default();
                let after = sets.without(words[number], slot, &mut memo.1, guard);
                assert_eq!(after.is_some(), models[number].remove(&slot));
                replace(&mut words[number], after, guard);
            }
            assert!(slots_of(words[number], guard).as_slice().iter().eq(&models[number]));
            for other in 0..40 {
                assert_eq!(words[other] == words[number], models[other] == models[number]);
            }
        }
        for word in &mut words {
            let guard = &pin();
            while let Some(slot) = slots_of(*word, guard).as_slice().first().copied() {
                replace(word, sets.without(*word, slot, &mut Memo::default(), guard), guard);
            }
        }
        assert_eq!(sets.bytes(), 0);
        assert!(sets.table.lock().is_empty());
    }
}
