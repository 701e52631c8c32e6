//! The ledger of one source: which blocks its engine named, and which block keys those are. The twin of
//! `indexer/ledger.py`, which says why each step is as it is; here the changes go to the table of blocks at once.

mod dump;
mod slot;
mod upkeep;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_epoch::pin;
use hashbrown::HashMap;

pub use self::slot::{Slot, Tier};
use crate::blocks::{Blocks, Step};
use crate::counters::{Counters, count};
use crate::events::{EngineHash, Removed, Stored};
use crate::groups::GroupSpec;
use crate::keys::{chain, root_key};
use crate::slots::Slots;
use crate::waiting::{Place, WaitingRoom};

/// How many steps are kept back at most.
const DUE: usize = 1024;

/// A block key and the size of its block.
pub type Known = (u64, u32);

/// Removed blocks whose tokens are still known, for events that name them without tokens.
#[derive(Default)]
struct Remembered {
    known: HashMap<EngineHash, Known>,
    order: VecDeque<EngineHash>,
}

impl Remembered {
    fn keep(&mut self, name: EngineHash, known: Known, limit: usize) {
        if self.known.insert(name, known).is_none() {
            self.order.push_back(name);
        }
        if self.known.len() > limit
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
    }

    fn bytes(&self) -> usize {
        self.known.capacity() * 33 + self.order.capacity() * 16
    }
}

/// Bounds, as in `indexer.Limits`.
#[derive(Clone, Debug)]
pub struct Limits {
    pub max_sources: usize,
    pub max_slots_per_source: usize,
    pub parked_blocks: usize,
    pub remembered_blocks: usize,
    pub block_sizes: usize,
    pub silent_tier_ttl_s: f64,
    /// None: no bound.
    pub max_bytes: Option<usize>,
}

/// What a ledger works on. It owns none of it.
pub struct Here<'a> {
    pub blocks: &'a Blocks,
    pub counters: &'a Counters,
    pub limits: &'a Limits,
    /// Multiplies engine hashes.
    pub secret: u64,
    pub slots: &'a Slots,
    /// Looks a hash up in other sources, for caches that the whole fleet shares.
    pub elsewhere: Option<&'a dyn Fn(EngineHash) -> Option<Known>>,
}

/// See the module. One writer at a time.
pub struct Ledger {
    pub model: Arc<str>,
    pub groups: Vec<(u32, GroupSpec)>,
    pub slots: Vec<Slot>,
    pub waiting: WaitingRoom,
    counted: bool,
    remembered: Remembered,
    conflicts: bool,
    /// The tier whose blocks were forgotten last to keep a bound.
    evicted: Option<Tier>,
    /// What `bytes` was when it was last added to the index's.
    pub accounted: usize,
    /// The source is no longer followed.
    pub gone: bool,
    /// What is still to be done to the table of blocks, for one slot; see `settle`.
    due: Vec<Step>,
    due_slot: usize,
}

impl Ledger {
    pub fn new(model: Arc<str>, counted: bool, parked_blocks: usize, groups: Vec<(u32, GroupSpec)>) -> Self {
        Self {
            model,
            groups,
            slots: Vec::new(),
            waiting: WaitingRoom::new(parked_blocks),
            counted,
            remembered: Remembered::default(),
            conflicts: false,
            evicted: None,
            accounted: 0,
            gone: false,
            due: Vec::new(),
            due_slot: 0,
        }
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        let slots: usize = self.slots.iter().map(Slot::bytes).sum();
        size_of::<Self>() + slots + self.waiting.bytes() + self.remembered.bytes() + self.groups.capacity() * 32
    }

    /// Blocks held, each counted once for each medium and group.
    pub fn len(&self) -> usize {
        self.slots.iter().map(Slot::len).sum()
    }

    /// Why the ledger may know less than the engine holds, "" when it knows all.
    pub fn degraded(&self) -> &'static str {
        if self.conflicts {
            return "hash mismatch: one block hash was announced for different tokens";
        }
        match self.evicted {
            Some(Tier::Gpu) => return "over max_bytes: blocks on gpu were forgotten",
            Some(Tier::Cpu) => return "over max_bytes: blocks on cpu were forgotten",
            Some(Tier::Disk) => return "over max_bytes: blocks on disk were forgotten",
            Some(Tier::Shared) => return "over max_bytes: blocks on shared were forgotten",
            None => (),
        }
        if self.waiting.has_unplaced() || self.waiting.dropped > 0 {
            return "unplaced: the engine named blocks without saying which tokens they hold";
        }
        if self.waiting.has_lost_parents() {
            return "unknown parent: blocks were stored whose predecessors were never announced";
        }
        ""
    }

    /// Applies a store event, and what waited for it; gives the names of the latter.
    pub fn store(&mut self, event: &Stored, at: &Here) -> Vec<EngineHash> {
        let mut released = Vec::new();
        if !self.store_one(event, at) || !self.waiting.has_parked() {
            return released;
        }
        let mut names: Vec<(EngineHash, u32)> = names_of(event).collect();
        let mut stored = Vec::new();
        loop {
            for (name, size) in names.drain(..) {
                for parked in self.waiting.unpark(name, size) {
                    let follow = self.store_one(&parked.event, at);
                    if !parked.removed.is_empty() {
                        let place = parked.place();
                        self.remove_from(&place, &parked.removed, at);
                    }
                    if follow {
                        released.extend_from_slice(&parked.event.block_hashes);
                        stored.push(parked.event);
                    }
                }
            }
            let Some(event) = stored.pop() else { return released };
            names.extend(names_of(&event));
        }
    }

    /// Applies one event alone; says whether blocks may follow its hashes now.
    fn store_one(&mut self, event: &Stored, at: &Here) -> bool {
        let (hashes, size) = (&event.block_hashes, event.block_size);
        if let Some(group) = event.group
            && size > 0
            && !self.groups.iter().any(|(number, _)| *number == group)
        {
            self.groups.push((group, GroupSpec::of(event.kind.as_deref(), event.sliding_window, size)));
            at.slots.change_layout();
        }
        if hashes.is_empty() {
            return false;
        }
        if size == 0 || event.token_ids.is_empty() {
            self.store_named(event, 0, at);
            return false;
        }
        let width = size as usize;
        if event.token_ids.len() / width > hashes.len() {
            self.store_named(event, size, at);
            return true;
        }
        let parent = match event.parent {
            None => root_key(&self.model, size, event.lora.as_ref(), event.cache_salt.as_deref()),
            Some(name) => match self.find(name, size, at.secret) {
                Some((key, _)) => key,
                None if self.ends_a_prompt(event, name, at) => {
                    count(&at.counters.partial_blocks, hashes.len());
                    return false;
                }
                None => {
                    count(&at.counters.parked, hashes.len());
                    self.waiting.park(event, name);
                    return false;
                }
            },
        };
        let Some(slot) = self.slot(&event.medium, event.group, size, at) else { return false };
        for name in hashes {
            self.slots[slot].held.prefetch(*name, at.secret);
        }
        // an engine may send a token more than its blocks hold (WIRE B1a)
        let tokens = &event.token_ids[..event.token_ids.len().min(width * hashes.len())];
        let keys = || chain(parent, tokens, width, event.extras.as_deref());
        let held = self.hold(slot, hashes, keys(), at);
        count(&at.counters.partial_blocks, hashes.len() - held);
        if self.waiting.has_unplaced() {
            for (name, key) in hashes.iter().zip(keys()) {
                self.place(*name, (key, size), at);
            }
        }
        true
    }

    /// Says whether this is what was left of a prompt behind its whole chunks (WIRE B1a): no whole block either.
    fn ends_a_prompt(&self, event: &Stored, parent: EngineHash, at: &Here) -> bool {
        event.group.is_none()
            && Tier::of(&event.medium) != Tier::Gpu
            && self.find(parent, 0, at.secret).is_some_and(|(_, size)| size > event.block_size)
    }

    /// Stores hashes that do not come with their own tokens; `size` 0 takes any block size they are known with.
    fn store_named(&mut self, event: &Stored, size: u32, at: &Here) {
        let place = Place { medium: event.medium.clone(), group: event.group };
        for name in &event.block_hashes {
            let known = self.find(*name, size, at.secret).or_else(|| at.elsewhere.and_then(|find| find(*name)));
            match known {
                None => {
                    count(&at.counters.unplaced, 1);
                    self.waiting.wait(*name, &place, size, self.counted);
                }
                Some((key, size)) => {
                    if let Some(slot) = self.slot(&place.medium, place.group, size, at) {
                        self.hold(slot, &[*name], [key].into_iter(), at);
                    }
                }
            }
        }
    }

    /// Places the copies that wait under a name whose key is known now.
    pub fn place(&mut self, name: EngineHash, known: Known, at: &Here) {
        let (key, size) = known;
        for place in self.waiting.placed(name, size) {
            if let Some(slot) = self.slot(&place.medium, place.group, size, at) {
                self.hold(slot, &[name], [key].into_iter(), at);
            }
        }
    }

    /// Gives the number of blocks: as many as there are keys.
    fn hold(&mut self, slot: usize, hashes: &[EngineHash], keys: impl Iterator<Item = u64>, at: &Here) -> usize {
        self.turn_to(slot, at);
        let slot = &mut self.slots[slot];
        let mut held = 0;
        for (name, key) in hashes.iter().zip(keys) {
            held += 1;
            let before = slot.held.insert_or_get(*name, key, at.secret);
            if before == 0 {
                self.due.push(Step { key, holds: true });
            } else if before != key {
                count(&at.counters.hash_conflicts, 1);
                self.conflicts = true;
            } else if self.counted {
                *slot.copies.entry(*name).or_insert(1) += 1;
                count(&at.counters.copies, 1);
            }
        }
        if let Some(seen) = &mut slot.seen {
            let now = Instant::now();
            for name in &hashes[..held] {
                seen.announce(*name, now);
            }
        }
        held
    }

    /// Makes steps that follow be those of a slot. There are not too many of them yet.
    fn turn_to(&mut self, slot: usize, at: &Here) {
        if slot != self.due_slot || self.due.len() >= DUE {
            self.settle(at);
            self.due_slot = slot;
        }
        if self.due.capacity() == 0 {
            self.due = Step::room();
        }
    }

    /// Does to the table of blocks what is still to be done, for many blocks at a time. At the latest before the lock of
    /// the ledger is let go.
    pub fn settle(&mut self, at: &Here) {
        let due = std::mem::take(&mut self.due);
        if !due.is_empty() {
            let slot = &mut self.slots[self.due_slot];
            at.blocks.take(slot.id, &due, &mut slot.aliases, &pin());
        }
        Step::give_back(due);
    }

    /// Applies a removal. It takes one copy of each hash.
    pub fn remove(&mut self, event: &Removed, at: &Here) {
        let place = Place { medium: event.medium.clone(), group: event.group };
        self.remove_from(&place, &event.block_hashes, at);
    }

    fn remove_from(&mut self, place: &Place, hashes: &[EngineHash], at: &Here) {
        let slots = self.slots_at(place);
        if let [slot] = slots[..] {
            self.slots[slot].seen = None; // removals are announced here, so nothing has to age out
            for name in hashes {
                self.slots[slot].held.prefetch(*name, at.secret);
            }
        }
        for name in hashes {
            let holder = slots.iter().copied().find(|slot| self.slots[*slot].held.get(*name, at.secret) != 0);
            let mut waited = false;
            if self.waiting.blocks > 0 && (holder.is_none() || !self.counted) {
                waited = self.waiting.remove(*name, place, self.counted);
            }
            let Some(holder) = holder else {
                count(&at.counters.removed_unknown, usize::from(!waited));
                continue;
            };
            let slot = &mut self.slots[holder];
            slot.seen = None; // what another connector keeps on the medium, in other sizes, may have to yet
            match slot.copies.get_mut(name) {
                None => self.drop_name(holder, *name, at),
                Some(2) => {
                    slot.copies.remove(name);
                }
                Some(copies) => *copies -= 1,
            }
        }
    }

    /// Takes a name out of a slot that has it, and remembers it.
    fn drop_name(&mut self, slot: usize, name: EngineHash, at: &Here) {
        self.turn_to(slot, at);
        let slot = &mut self.slots[slot];
        let key = slot.held.remove(name, at.secret);
        self.due.push(Step { key, holds: false });
        self.remembered.keep(name, (key, slot.block_size), at.limits.remembered_blocks);
    }

    /// Key and block size of a hash that is or lately was held anywhere; `size` 0 takes any block size.
    pub fn find(&self, name: EngineHash, size: u32, secret: u64) -> Option<Known> {
        for slot in &self.slots {
            if size == 0 || size == slot.block_size {
                let key = slot.held.get(name, secret);
                if key != 0 {
                    return Some((key, slot.block_size));
                }
            }
        }
        self.remembered.known.get(&name).copied().filter(|known| size == 0 || size == known.1)
    }

    /// The slot for these blocks, made where there is none; None where there are too many.
    fn slot(&mut self, medium: &Arc<str>, group: Option<u32>, size: u32, at: &Here) -> Option<usize> {
        let known =
            self.slots.iter().position(|slot| slot.block_size == size && slot.group == group && slot.medium == *medium);
        if known.is_some() {
            return known;
        }
        let id = if self.slots.len() < at.limits.max_slots_per_source { at.slots.take() } else { None };
        let Some(id) = id else {
            count(&at.counters.too_many_slots, 1);
            return None;
        };
        self.slots.push(Slot::new(id, medium.clone(), group, size));
        at.slots.change_layout();
        Some(self.slots.len() - 1)
    }

    /// The slots that a removal can mean. Some publishers of one engine say the group, others do not.
    fn slots_at(&self, place: &Place) -> Vec<usize> {
        let here = |wanted: &dyn Fn(&Slot) -> bool| -> Vec<usize> {
            let slots = self.slots.iter().enumerate();
            slots.filter(|(_, slot)| slot.medium == place.medium && wanted(slot)).map(|(number, _)| number).collect()
        };
        let exact = here(&|slot| slot.group == place.group);
        if !exact.is_empty() {
            return exact;
        }
        here(&|slot| place.group.is_none() || slot.group.is_none())
    }
}

fn names_of(event: &Stored) -> impl Iterator<Item = (EngineHash, u32)> + use<> {
    let size = event.block_size;
    event.block_hashes.clone().into_iter().map(move |name| (name, size))
}
