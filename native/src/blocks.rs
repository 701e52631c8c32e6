//! The table of blocks: block key → the slots that hold it.
//!
//! The keys are divided among shards by their first bits. Writers of a shard take its lock. Readers take none:
//!
//! * They are pinned (`crossbeam_epoch`), so a table that a writer replaced by a larger one stays until they are done.
//! * A value is one word, see `holders.rs`, and changes in one step: the holders of a block are seen whole.
//! * Where rows move, a writer makes the shard's version odd, moves them, and makes it even again. A reader that saw an
//!   odd version, or another one after its look-up than before, looks again. All words are atomics, so what it read
//!   meanwhile was old or new but never undefined. Rows move for some ten nanoseconds, so readers rarely look twice.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};

use crossbeam_epoch::{Atomic, Guard, Owned};
use hashbrown::HashMap;
use parking_lot::Mutex;

use crate::holders::{Changes, Sets, SlotId};
use crate::table::{Place, Table, homes_for, is_crowded, is_sparse};

const SHARD_BITS: u32 = 6;
const SHARDS: usize = 1 << SHARD_BITS;

/// How many keys ahead of a change their rows are asked for.
const AHEAD: usize = 16;

#[repr(align(64))]
struct Shard {
    version: AtomicU64,
    table: Atomic<Table<1>>,
    /// Rows in use.
    len: Mutex<usize>,
}

impl Shard {
    #[inline]
    fn table<'g>(&self, guard: &'g Guard) -> &'g Table<1> {
        // SAFETY: the pointer is never null, and what it replaced is kept until the guard is dropped.
        unsafe { self.table.load(Ordering::Acquire, guard).deref() }
    }

    /// Lets rows move. Only with the shard's lock.
    #[inline]
    fn moving<T>(&self, work: impl FnOnce() -> T) -> T {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        let result = work();
        self.version.store(version + 2, Ordering::Release);
        result
    }

    #[inline]
    fn get(&self, key: u64, guard: &Guard) -> u64 {
        loop {
            let version = self.version.load(Ordering::Acquire);
            let value = self.table(guard).get([key]);
            fence(Ordering::Acquire);
            if version & 1 == 0 && version == self.version.load(Ordering::Relaxed) {
                return value;
            }
            std::hint::spin_loop();
        }
    }
}

/// From now on a slot holds a block, or holds it no longer.
#[derive(Clone, Copy)]
pub struct Step {
    pub key: u64,
    pub holds: bool,
}

thread_local! {
    static SPARE: RefCell<Vec<Vec<Step>>> = const { RefCell::new(Vec::new()) };
}

impl Step {
    /// How many steps a list may have whose room is kept.
    const KEPT: usize = 4096;

    /// An empty list, with the room of one that this thread gave back: events come and go too fast to allocate for each.
    pub fn room() -> Vec<Self> {
        SPARE.with_borrow_mut(Vec::pop).unwrap_or_default()
    }

    /// Keeps the room of a list that is done with.
    pub fn give_back(mut steps: Vec<Self>) {
        if (1..=Self::KEPT).contains(&steps.capacity()) {
            steps.clear();
            SPARE.with_borrow_mut(|spare| spare.push(steps));
        }
    }
}

/// See the module.
pub struct Blocks {
    shards: Box<[Shard; SHARDS]>,
    sets: Sets,
    /// Keys are multiplied by it, so that nobody who can choose tokens can choose which rows they crowd.
    secret: u64,
    bytes: AtomicUsize,
}

impl Blocks {
    /// `secret` may be any odd number.
    pub fn new(secret: u64) -> Self {
        let shards: Vec<Shard> = (0..SHARDS)
            .map(|_| Shard { version: AtomicU64::new(0), table: Atomic::new(Table::new(0)), len: Mutex::new(0) })
            .collect();
        let bytes = SHARDS * (size_of::<Shard>() + Table::<1>::new(0).bytes());
        let shards = shards.try_into().unwrap_or_else(|_| unreachable!("there are as many as were made"));
        Self { shards, sets: Sets::default(), secret: secret | 1, bytes: AtomicUsize::new(bytes) }
    }

    /// Blocks that somebody holds.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| *shard.len.lock()).sum()
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed) + self.sets.bytes()
    }

    #[inline]
    fn shard_number(&self, key: u64) -> usize {
        (key.wrapping_mul(self.secret) >> (64 - SHARD_BITS)) as usize
    }

    /// The key that stands in the table of its shard.
    #[inline]
    fn row_key(&self, key: u64) -> u64 {
        key.wrapping_mul(self.secret).rotate_left(SHARD_BITS)
    }

    /// Asks for the row of a key ahead of `holders`.
    #[inline]
    pub fn prefetch(&self, key: u64, guard: &Guard) {
        self.shards[self.shard_number(key)].table(guard).prefetch(&[self.row_key(key)]);
    }

    /// The word of the slots that hold a block, 0 for nobody.
    #[inline]
    pub fn holders(&self, key: u64, guard: &Guard) -> u64 {
        self.shards[self.shard_number(key)].get(self.row_key(key), guard)
    }

    /// Takes the steps of a slot in order. `aliases` counts how often a block is held besides, under other names: so
    /// often it has to be released before it is gone.
    pub fn take(&self, slot: SlotId, steps: &[Step], aliases: &mut HashMap<u64, u64>, guard: &Guard) {
        let sorted = self.by_shard(steps);
        let steps = &sorted[..];
        let mut changes = self.sets.changes(slot, guard);
        for step in steps.iter().take(AHEAD) {
            self.prefetch(step.key, guard);
        }
        let mut ahead = steps.iter().skip(AHEAD);
        for steps in steps.chunk_by(|one, next| self.shard_number(one.key) == self.shard_number(next.key)) {
            let shard = &self.shards[self.shard_number(steps[0].key)];
            let mut len = shard.len.lock();
            for step in steps {
                if let Some(step) = ahead.next() {
                    self.prefetch(step.key, guard);
                }
                if step.holds {
                    if !self.hold(shard, &mut len, self.row_key(step.key), &mut changes, guard) {
                        *aliases.entry(step.key).or_insert(0) += 1;
                    }
                } else if aliases.is_empty() || !take_one(aliases, step.key) {
                    self.release(shard, &mut len, self.row_key(step.key), &mut changes, guard);
                }
            }
        }
        Step::give_back(sorted);
    }

    /// The steps divided by shard, so that its lock is taken once for all of them; for each block in order.
    fn by_shard(&self, steps: &[Step]) -> Vec<Step> {
        let mut ends = [0usize; SHARDS];
        for step in steps {
            ends[self.shard_number(step.key)] += 1;
        }
        let mut sum = 0;
        for end in &mut ends {
            sum += std::mem::replace(end, sum);
        }
        let mut sorted = Step::room();
        sorted.resize(steps.len(), Step { key: 0, holds: false });
        for step in steps {
            let place = &mut ends[self.shard_number(step.key)];
            sorted[*place] = *step;
            *place += 1;
        }
        sorted
    }

    /// Says no where the slot holds the block already.
    #[inline]
    fn hold(&self, shard: &Shard, len: &mut usize, key: u64, changes: &mut Changes, guard: &Guard) -> bool {
        loop {
            let table = shard.table(guard);
            match table.place(&[key]) {
                Place::Found(number) => {
                    let row = &table.rows()[number];
                    let Some(after) = changes.with(row.value()) else { return false };
                    row.set_value(after);
                    return true;
                }
                Place::Vacant(_) if is_crowded(*len + 1, table.homes()) => {
                    self.replace(shard, table.resized(homes_for(*len + 1)), guard);
                }
                Place::Vacant(number) => {
                    let Some(word) = changes.with(0) else { return false };
                    let has_room = if table.is_gap(number) {
                        table.insert(number, [key], word)
                    } else {
                        shard.moving(|| table.insert(number, [key], word))
                    };
                    *len += 1;
                    if !has_room {
                        self.replace(shard, table.with_more_spare(), guard);
                    }
                    return true;
                }
            }
        }
    }

    #[inline]
    fn release(&self, shard: &Shard, len: &mut usize, key: u64, changes: &mut Changes, guard: &Guard) {
        let table = shard.table(guard);
        let Place::Found(number) = table.place(&[key]) else { return };
        let row = &table.rows()[number];
        let Some(after) = changes.without(row.value()) else { return };
        if after != 0 {
            row.set_value(after);
            return;
        }
        shard.moving(|| table.remove(number));
        *len -= 1;
        if is_sparse(*len, table.homes()) {
            self.replace(shard, table.resized(homes_for(*len)), guard);
        }
    }

    /// Gives back the memory of rows that are no longer in use.
    pub fn compact(&self, guard: &Guard) {
        for shard in self.shards.iter() {
            let len = shard.len.lock();
            let table = shard.table(guard);
            if homes_for(*len) < table.homes() {
                self.replace(shard, table.resized(homes_for(*len)), guard);
            }
        }
    }

    /// Puts another table in place of a shard's. Only with the shard's lock.
    fn replace(&self, shard: &Shard, table: Table<1>, guard: &Guard) {
        self.bytes.fetch_add(table.bytes(), Ordering::Relaxed);
        let before = shard.table.swap(Owned::new(table), Ordering::AcqRel, guard);
        // SAFETY: no new reader can find the old table, and those that have it are pinned.
        unsafe {
            self.bytes.fetch_sub(before.deref().bytes(), Ordering::Relaxed);
            guard.defer_destroy(before);
        }
        guard.flush(); // tables are large: they should not wait until many of them are given back together
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        for shard in self.shards.iter_mut() {
            let table = std::mem::replace(&mut shard.table, Atomic::null());
            // SAFETY: nobody else is left, and the pointer was never null.
            drop(unsafe { table.into_owned() });
        }
    }
}

/// Takes one off a count; says no where there is none.
fn take_one(counts: &mut HashMap<u64, u64>, key: u64) -> bool {
    let Some(count) = counts.get_mut(&key) else { return false };
    *count -= 1;
    if *count == 0 {
        counts.remove(&key);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::holders::slots_of;
    use crossbeam_epoch::pin;
    use std::sync::atomic::AtomicBool;
    use xxhash_rust::xxh3::xxh3_64;

    fn key(number: u64) -> u64 {
        xxh3_64(&number.to_le_bytes())
    }

    fn hold(blocks: &Blocks, slot: SlotId, keys: &[u64]) {
        let steps: Vec<Step> = keys.iter().map(|key| Step { key: *key, holds: true }).collect();
        blocks.take(slot, &steps, &mut HashMap::new(), &pin());
    }

    fn release(blocks: &Blocks, slot: SlotId, keys: &[u64]) {
        let steps: Vec<Step> = keys.iter().map(|key| Step { key: *key, holds: false }).collect();
        blocks.take(slot, &steps, &mut HashMap::new(), &pin());
    }

    /// Writers come and go on the same keys while readers check that blocks that nobody takes away are always there,
    /// and that whoever holds a block together with others is never seen without them.
    #[test]
    fn readers_see_holders_whole_while_writers_move_rows() {
        let (blocks, done) = (Blocks::new(12345), AtomicBool::new(false));
        let lasting: Vec<u64> = (0..500).map(key).collect();
        for slot in [1, 2, 3, 4, 5] {
            hold(&blocks, slot, &lasting);
        }
        std::thread::scope(|scope| {
            let mut writers = Vec::new();
            for writer in 0..3u32 {
                let (blocks, lasting) = (&blocks, &lasting);
                writers.push(scope.spawn(move || {
                    let own: Vec<u64> =
                        (0..3000).map(|number| key(1000 + number % 2000 + u64::from(writer) * 500)).collect();
                    for _ in 0..30 {
                        for keys in own.chunks(100) {
                            hold(blocks, 10 + writer, keys);
                        }
                        hold(blocks, 10 + writer, lasting);
                        release(blocks, 10 + writer, &own);
                        release(blocks, 10 + writer, lasting);
                        blocks.compact(&pin());
                    }
                }));
            }
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        let guard = pin();
                        for key in &lasting {
                            let held = slots_of(blocks.holders(*key, &guard), &guard);
                            assert_eq!(held.as_slice()[..5], [1, 2, 3, 4, 5]);
                            assert!(held.as_slice()[5..].is_sorted());
                        }
                    }
                });
            }
            let finished: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
            done.store(true, Ordering::Relaxed);
            assert!(finished.iter().all(Result::is_ok));
        });
        assert_eq!(blocks.len(), 500);
        for slot in [1, 2, 3, 4, 5] {
            release(&blocks, slot, &lasting);
        }
        assert_eq!(blocks.len(), 0);
        assert_eq!(blocks.sets.bytes(), 0);
    }
}
