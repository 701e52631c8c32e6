//! Blocks of one source that cannot be placed yet, within one bound: the twin of `indexer/waiting.py`.

use std::collections::BTreeMap;
use std::hash::Hash;
use std::sync::Arc;

use hashbrown::HashMap;

use crate::events::{EngineHash, Stored};

/// Where a copy lies.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Place {
    pub medium: Arc<str>,
    pub group: Option<u32>,
}

/// A store event that waits, and those of its blocks that were removed meanwhile.
pub struct ParkedEvent {
    pub event: Stored,
    pub removed: Vec<EngineHash>,
}

impl ParkedEvent {
    pub fn place(&self) -> Place {
        Place { medium: self.event.medium.clone(), group: self.event.group }
    }

    fn bytes(&self) -> usize {
        size_of::<Self>() + 4 * self.event.token_ids.len() + PER_NAME * self.event.block_hashes.len()
    }
}

/// What a waiting name costs in the tables below, about.
const PER_NAME: usize = 160;

/// A map that knows which key came first.
struct Ordered<K, V> {
    values: HashMap<K, (u64, V)>,
    order: BTreeMap<u64, K>,
    next: u64,
}

impl<K, V> Default for Ordered<K, V> {
    fn default() -> Self {
        Self { values: HashMap::new(), order: BTreeMap::new(), next: 0 }
    }
}

impl<K: Clone + Eq + Hash, V: Default> Ordered<K, V> {
    fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.values.get_mut(key).map(|(_, value)| value)
    }

    fn entry(&mut self, key: &K) -> &mut V {
        let (_, value) = self.values.entry(key.clone()).or_insert_with(|| {
            self.order.insert(self.next, key.clone());
            self.next += 1;
            (self.next - 1, V::default())
        });
        value
    }

    fn remove(&mut self, key: &K) -> Option<V> {
        let (number, value) = self.values.remove(key)?;
        self.order.remove(&number);
        Some(value)
    }

    fn pop_first(&mut self) -> Option<V> {
        let (_, key) = self.order.pop_first()?;
        self.values.remove(&key).map(|(_, value)| value)
    }
}

/// See the module. `blocks` is the number of blocks that wait.
#[derive(Default)]
pub struct WaitingRoom {
    limit: usize,
    parked: Ordered<(EngineHash, u32), Vec<u64>>,
    parked_copies: HashMap<(Place, EngineHash), Vec<u64>>,
    events: HashMap<u64, ParkedEvent>,
    next_event: u64,
    /// How many parents that are waited for are not `NOT_SAID`.
    said_parents: usize,
    unplaced: Ordered<EngineHash, Vec<(Place, u32)>>,
    unplaced_copies: usize,
    event_bytes: usize,
    pub blocks: usize,
    /// Blocks that had to go because more waited than may.
    pub dropped: u64,
}

/// What LMCache's in-process connector sends for a parent it does not know (WIRE B1a). Such blocks wait like others
/// whose parent is unknown, but say nothing about lost events.
const NOT_SAID: EngineHash = EngineHash::from_int(0);

impl WaitingRoom {
    pub fn new(limit: usize) -> Self {
        Self { limit, ..Self::default() }
    }

    /// Bytes of memory, about.
    pub fn bytes(&self) -> usize {
        self.event_bytes + PER_NAME * self.unplaced_copies
    }

    pub fn has_parked(&self) -> bool {
        !self.parked.is_empty()
    }

    pub fn has_unplaced(&self) -> bool {
        !self.unplaced.is_empty()
    }

    /// Says whether an event waits for a parent that the engine named.
    pub fn has_lost_parents(&self) -> bool {
        self.said_parents > 0
    }

    /// Keeps an event until `parent`, a block of the same size, is stored.
    pub fn park(&mut self, event: &Stored, parent: EngineHash) {
        let parked = ParkedEvent { event: event.clone(), removed: Vec::new() };
        let (id, place) = (self.next_event, parked.place());
        self.next_event += 1;
        let siblings = self.parked.entry(&(parent, event.block_size));
        self.said_parents += usize::from(siblings.is_empty() && parent != NOT_SAID);
        siblings.push(id);
        for name in &event.block_hashes {
            self.parked_copies.entry((place.clone(), *name)).or_default().push(id);
        }
        self.blocks += event.block_hashes.len();
        self.event_bytes += parked.bytes();
        self.events.insert(id, parked);
        self.keep_bound();
    }

    /// Gives the events that waited for `parent`, in order, and keeps them no longer.
    pub fn unpark(&mut self, parent: EngineHash, block_size: u32) -> Vec<ParkedEvent> {
        let Some(ids) = self.parked.remove(&(parent, block_size)) else { return Vec::new() };
        self.said_parents -= usize::from(parent != NOT_SAID);
        ids.into_iter().filter_map(|id| self.leave(id)).collect()
    }

    fn leave(&mut self, id: u64) -> Option<ParkedEvent> {
        let parked = self.events.remove(&id)?;
        self.blocks -= parked.event.block_hashes.len();
        self.event_bytes -= parked.bytes();
        let place = parked.place();
        for name in &parked.event.block_hashes {
            let key = (place.clone(), *name);
            if let Some(copies) = self.parked_copies.get_mut(&key) {
                if let Some(mine) = copies.iter().position(|other| *other == id) {
                    copies.remove(mine);
                }
                if copies.is_empty() {
                    self.parked_copies.remove(&key);
                }
            }
        }
        Some(parked)
    }

    /// The events that wait, in the order in which they came.
    pub fn parked(&self) -> Vec<&ParkedEvent> {
        let mut events: Vec<_> = self.events.iter().collect();
        events.sort_unstable_by_key(|(id, _)| **id);
        events.into_iter().map(|(_, parked)| parked).collect()
    }

    /// The copies that wait for their tokens, the names in order and the copies of each.
    pub fn unplaced(&self) -> Vec<(EngineHash, &Place, u32)> {
        let names = self.unplaced.order.values().map(|name| (*name, &self.unplaced.values[name].1));
        names.flat_map(|(name, copies)| copies.iter().map(move |(place, size)| (name, place, *size))).collect()
    }

    /// Keeps an event that waited before, with what was removed of it.
    pub fn put_back(&mut self, parked: &ParkedEvent, parent: EngineHash) {
        let (id, place) = (self.next_event, parked.place());
        self.park(&parked.event, parent);
        let Some(event) = self.events.get_mut(&id) else { return };
        event.removed.clone_from(&parked.removed);
        for name in &parked.removed {
            let key = (place.clone(), *name);
            let Some(copies) = self.parked_copies.get_mut(&key) else { continue };
            if let Some(mine) = copies.iter().position(|other| *other == id) {
                copies.remove(mine);
            }
            if copies.is_empty() {
                self.parked_copies.remove(&key);
            }
        }
    }

    /// Keeps a copy of a hash until its tokens are known; `block_size` 0 fits any.
    pub fn wait(&mut self, name: EngineHash, place: &Place, block_size: u32, counted: bool) {
        let copies = self.unplaced.entry(&name);
        if counted || !copies.iter().any(|(there, size)| there == place && *size == block_size) {
            copies.push((place.clone(), block_size));
            self.unplaced_copies += 1;
            self.blocks += 1;
        }
        self.keep_bound();
    }

    /// Gives where the waiting copies of a hash lie that fit `block_size`, and keeps them no longer.
    pub fn placed(&mut self, name: EngineHash, block_size: u32) -> Vec<Place> {
        let Some(copies) = self.unplaced.get_mut(&name) else { return Vec::new() };
        let mut found = Vec::new();
        copies.retain(|(place, size)| {
            let fits = *size == 0 || *size == block_size;
            if fits {
                found.push(place.clone());
            }
            !fits
        });
        if copies.is_empty() {
            self.unplaced.remove(&name);
        }
        self.blocks -= found.len();
        self.unplaced_copies -= found.len();
        found
    }

    /// Takes back a waiting copy (all parked ones where copies are not counted); says whether there was one.
    pub fn remove(&mut self, name: EngineHash, place: &Place, counted: bool) -> bool {
        if let Some(copies) = self.unplaced.get_mut(&name)
            && let Some(mine) = copies.iter().position(|(there, _)| there == place)
        {
            copies.remove(mine);
            self.blocks -= 1;
            self.unplaced_copies -= 1;
            if copies.is_empty() {
                self.unplaced.remove(&name);
            }
            return true;
        }
        let key = (place.clone(), name);
        let Some(parked) = self.parked_copies.get_mut(&key) else { return false };
        let taken = if counted { 1 } else { parked.len() };
        for id in parked.drain(..taken) {
            if let Some(event) = self.events.get_mut(&id) {
                event.removed.push(name);
            }
        }
        if parked.is_empty() {
            self.parked_copies.remove(&key);
        }
        true
    }

    fn keep_bound(&mut self) {
        self.shrink_to(self.limit);
    }

    /// Gives up everything, counted.
    pub fn drop_all(&mut self) {
        self.shrink_to(0);
    }

    fn shrink_to(&mut self, limit: usize) {
        while self.blocks > limit {
            let before = self.blocks;
            if let Some((_, (parent, _))) = self.parked.order.first_key_value() {
                self.said_parents -= usize::from(*parent != NOT_SAID);
                for id in self.parked.pop_first().unwrap_or_default() {
                    self.leave(id);
                }
            } else if let Some(copies) = self.unplaced.pop_first() {
                self.blocks -= copies.len();
                self.unplaced_copies -= copies.len();
            } else {
                break;
            }
            self.dropped += (before - self.blocks) as u64;
        }
    }
}
