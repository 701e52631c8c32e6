//! What is done to a ledger beside applying events: counting copies anew, and forgetting what is too old or too much.

use std::time::Instant;

use hashbrown::HashSet;

use super::{Here, Ledger, Remembered, Slot, Tier};
use crate::counters::count;

impl Ledger {
    /// Counts one copy of each of these blocks, where more were counted; says no where cache groups decide.
    pub fn recount(&mut self, keys: &HashSet<u64>, at: &Here) -> bool {
        if self.groups_decide() {
            return false;
        }
        for slot in self.slots.iter_mut().filter(|slot| slot.tier == Tier::Gpu) {
            let Slot { held, copies, .. } = slot;
            copies.retain(|name, number| {
                let wrong = keys.contains(&held.get(*name, at.secret));
                count(&at.counters.recounted, if wrong { *number as usize - 1 } else { 0 });
                !wrong
            });
        }
        true
    }

    /// Counts the copies that `recount` would take.
    pub fn surplus(&self, keys: &HashSet<u64>, secret: u64) -> usize {
        if self.groups_decide() {
            return 0;
        }
        let first = self.slots.iter().filter(|slot| slot.tier == Tier::Gpu);
        let copied =
            first.flat_map(|slot| slot.copies.iter().map(|(name, number)| (slot.held.get(*name, secret), number)));
        copied.filter(|(key, _)| keys.contains(key)).map(|(_, number)| *number as usize - 1).sum()
    }

    fn groups_decide(&self) -> bool {
        self.groups.len() > 1 || self.groups.iter().any(|(_, spec)| spec.tail.is_some())
    }

    /// Drops blocks last announced before that time on media whose removals are never announced.
    pub fn expire(&mut self, before: Instant, at: &Here) {
        for number in 0..self.slots.len() {
            while let Some(name) = self.slots[number].seen.as_mut().and_then(|seen| seen.pop_before(before)) {
                self.slots[number].copies.remove(&name);
                if self.slots[number].held.get(name, at.secret) != 0 {
                    self.drop_name(number, name, at);
                    count(&at.counters.expired, 1);
                }
            }
        }
        self.settle(at);
    }

    /// Whether there is nothing to evict.
    pub fn is_empty(&self) -> bool {
        self.len() + self.waiting.blocks + self.remembered.known.len() == 0
    }

    /// Gives up the slots of the least useful tier, or what waits and is remembered where no blocks are held.
    pub fn evict(&mut self) -> Vec<Slot> {
        let held = self.slots.iter().filter(|slot| slot.len() > 0);
        let Some(tier) = held.map(|slot| slot.tier).max() else {
            self.waiting.drop_all();
            self.remembered = Remembered::default();
            return Vec::new();
        };
        self.evicted = Some(tier);
        self.slots.extract_if(.., |slot| slot.tier == tier).collect()
    }
}
