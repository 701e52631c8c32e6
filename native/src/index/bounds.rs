//! What keeps the index small: giving back what nobody holds any more, and forgetting what is too much or too old.

use std::cmp::Reverse;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_epoch::pin;
use hashbrown::HashMap;

use super::{Index, Tracked};
use crate::blocks::Step;
use crate::counters::count;
use crate::ledger::{Ledger, Slot};

/// Blocks reclaimed at a time: a reader that came before waits no longer for memory than that takes.
const SWEEP: usize = 4096;

impl Index {
    /// Takes the slots of ledgers that are no longer in use out of the table, in small steps.
    pub(super) fn reclaim_all(&self, ledgers: impl IntoIterator<Item = Ledger>) {
        for ledger in ledgers {
            self.ledger_bytes.fetch_sub(ledger.accounted, Ordering::Relaxed);
            for slot in &ledger.slots {
                self.reclaim(slot);
            }
        }
    }

    fn reclaim(&self, slot: &Slot) {
        let mut keys = slot.keys().peekable();
        while keys.peek().is_some() {
            let some: Vec<Step> = keys.by_ref().take(SWEEP).map(|key| Step { key, holds: false }).collect();
            self.blocks.take(slot.id, &some, &mut HashMap::new(), &pin());
        }
        self.slots.give_back(slot.id);
    }

    /// Bytes of memory in use.
    pub fn bytes(&self) -> usize {
        self.blocks.bytes() + self.ledger_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn keep_bound(&self) {
        let Some(limit) = self.limits.max_bytes else { return };
        while self.bytes() > limit && self.evict() {
            self.blocks.compact(&pin());
        }
    }

    /// Forgets the least useful tier of the largest source, or what else it remembers when it holds nothing; says no when
    /// nothing is left anywhere.
    fn evict(&self) -> bool {
        let bytes = |tracked: &Arc<Tracked>| {
            let ledger = tracked.ledger.lock();
            (!ledger.is_empty()).then_some((ledger.bytes(), Reverse(tracked.number)))
        };
        let largest = self.all().into_iter().filter_map(|tracked| Some((bytes(&tracked)?, tracked)));
        let Some((_, tracked)) = largest.max_by_key(|(bytes, _)| *bytes) else { return false };
        let mut ledger = tracked.ledger.lock();
        let gone = ledger.evict();
        self.slots.change_layout();
        self.settle(&tracked, &mut ledger);
        drop(ledger);
        for slot in &gone {
            count(&self.counters.evicted, slot.len());
            self.reclaim(slot);
        }
        true
    }

    /// Drops blocks that outlived `silent_tier_ttl_s`.
    pub fn expire(&self) {
        let ttl = Duration::try_from_secs_f64(self.limits.silent_tier_ttl_s).unwrap_or(Duration::MAX);
        let Some(before) = Instant::now().checked_sub(ttl) else { return };
        for tracked in self.all() {
            let mut ledger = tracked.ledger.lock();
            ledger.expire(before, &self.here(None));
            self.settle(&tracked, &mut ledger);
        }
    }
}
