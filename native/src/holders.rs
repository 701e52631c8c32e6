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

    /// Begins to change words by one slot.
    pub fn changes<'a>(&'a self, slot: SlotId, guard: &'a Guard) -> Changes<'a> {
        Changes { sets: self, guard, slot, known: [Known::default(); KNOWN] }
    }

    /// Refers to a set so many times more; says no where it is dead. A word without a set is always fine.
    #[inline]
    fn acquire(&self, word: u64, times: usize) -> bool {
        if word & TAG != 0 {
            return true;
        }
        // SAFETY: see `slots_of`: words come from the table of blocks or from earlier changes, read under one guard.
        let set = unsafe { &*(word as *const Set) };
        set.blocks
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |blocks| (blocks > 0).then_some(blocks + times))
            .is_ok()
    }

    /// The word of some slots, referred to so many times.
    fn word(&self, slots: &[SlotId], times: usize) -> u64 {
        if slots.len() <= INLINE {
            return inline_word(slots);
        }
        let hash = hash_of(slots);
        let mut table = self.table.lock();
        // SAFETY: addresses in the table are those of sets whose memory is not freed: `release` takes them out first.
        let known = table.find(hash, |address| unsafe { &*(*address as *const Set) }.slots[..] == *slots).copied();
        if let Some(address) = known
            && self.acquire(address as u64, times)
        {
            return address as u64;
        }
        let set = Box::new(Set { blocks: AtomicUsize::new(times), slots: slots.into() });
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

    /// Says that a word is referred to so many times less.
    fn release(&self, word: u64, times: usize, guard: &Guard) {
        if word & TAG != 0 || word == 0 || times == 0 {
            return;
        }
        // SAFETY: the caller has these references, so the set is alive.
        let set = unsafe { &*(word as *const Set) };
        if set.blocks.fetch_sub(times, Ordering::AcqRel) > times {
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

/// How many different changes are known at a time, and how many references are taken at once.
const KNOWN: usize = 8;
const CREDIT: usize = 64;

/// A change of a word, which most blocks of a chain repeat.
#[derive(Clone, Copy, Default)]
struct Known {
    before: u64,
    after: u64,
    more: bool,
    /// References to `after` that are taken and not used yet.
    credit: usize,
    /// References to `before` that are not used any more and not given back yet.
    debt: usize,
}

/// Changes of words by one slot, for one writer. References to sets are counted when it is dropped or needs the room:
/// later than they are given up and before they are used, so that no set dies early.
pub struct Changes<'a> {
    sets: &'a Sets,
    guard: &'a Guard,
    slot: SlotId,
    known: [Known; KNOWN],
}

impl Changes<'_> {
    /// The word with the slot in it, None where it is already. The caller puts it in the old one's place at once.
    #[inline]
    pub fn with(&mut self, word: u64) -> Option<u64> {
        if word == 0 {
            return Some(inline_word(&[self.slot]));
        }
        self.known_or(word, true)
    }

    /// The word without the slot, None where it is not in it. The caller puts it in the old one's place at once.
    #[inline]
    pub fn without(&mut self, word: u64) -> Option<u64> {
        if word == inline_word(&[self.slot]) {
            return Some(0);
        }
        if word == 0 {
            return None;
        }
        self.known_or(word, false)
    }

    #[inline]
    fn known_or(&mut self, word: u64, more: bool) -> Option<u64> {
        let number = (word.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 61) as usize;
        let known = &mut self.known[number];
        if known.before == word && known.more == more {
            if known.credit == 0 && self.sets.acquire(known.after, CREDIT) {
                known.credit = CREDIT;
            }
            if known.credit > 0 {
                known.credit -= 1;
                known.debt += 1;
                return Some(known.after);
            }
        }
        self.change(number, word, more)
    }

    #[cold]
    fn change(&mut self, number: usize, word: u64, more: bool) -> Option<u64> {
        let before = slots_of(word, self.guard);
        let slots = before.as_slice();
        let place = slots.binary_search(&self.slot);
        if place.is_ok() == more {
            return None;
        }
        let (Ok(place) | Err(place)) = place;
        let mut after = Vec::with_capacity(slots.len() + 1);
        after.extend_from_slice(&slots[..place]);
        if more {
            after.push(self.slot);
        }
        after.extend_from_slice(&slots[place + usize::from(!more)..]);
        let after = self.sets.word(&after, CREDIT);
        let known = Known { before: word, after, more, credit: CREDIT - 1, debt: 1 };
        let last = std::mem::replace(&mut self.known[number], known);
        self.settle(last);
        Some(after)
    }

    fn settle(&self, known: Known) {
        self.sets.release(known.before, known.debt, self.guard);
        self.sets.release(known.after, known.credit, self.guard);
    }
}

impl Drop for Changes<'_> {
    fn drop(&mut self) {
        for known in self.known {
            self.settle(known);
        }
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
        let sets = Sets::default();
        let (mut words, mut models) = (vec![0u64; 40], vec![BTreeSet::new(); 40]);
        let mut state = 99u64;
        for _ in 0..40_000 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let (number, slot) = ((state >> 33) as usize % 40, (state >> 45) as u32 % 12 * 80_000);
            let guard = &pin();
            let mut changes = sets.changes(slot, guard);
            // some blocks one after the other, mostly with the same holders
            for number in number..(number + 3).min(40) {
                let after = if state >> 62 != 0 {
                    let after = changes.with(words[number]);
                    assert_eq!(after.is_some(), models[number].insert(slot));
                    after
                } else {
                    let after = changes.without(words[number]);
                    assert_eq!(after.is_some(), models[number].remove(&slot));
                    after
                };
                words[number] = after.unwrap_or(words[number]);
            }
            drop(changes);
            assert!(slots_of(words[number], guard).as_slice().iter().eq(&models[number]));
            for other in 0..40 {
                assert_eq!(words[other] == words[number], models[other] == models[number]);
            }
        }
        for word in &mut words {
            let guard = &pin();
            while let Some(slot) = slots_of(*word, guard).as_slice().first().copied() {
                *word = sets.changes(slot, guard).without(*word).unwrap_or_default();
            }
        }
        assert_eq!(sets.bytes(), 0);
        assert!(sets.table.lock().is_empty());
    }
}
