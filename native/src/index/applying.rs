//! Events into ledgers, and what one source says that another waits for.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::MutexGuard;

use super::{Index, Name, Refusal, Tracked};
use crate::counters::count;
use crate::events::{Batch, EngineHash, Event};
use crate::ledger::Known;
use crate::wire::{DecodeError, decode_batch};

/// What became of payloads, see `Index::apply_payloads`.
#[derive(Debug, Default)]
pub struct Applied {
    pub payloads: usize,
    /// How many events they had.
    pub events: usize,
    /// The others, decoded.
    pub rest: Vec<Result<Batch, DecodeError>>,
}

impl Index {
    /// Decodes and applies payloads of a source, one by one while each is in the cache, up to the first that is more than
    /// events to apply: no batch, of another rank, with events that were discarded, or a clear. `first_seq` is the number
    /// of the first; the others follow it. Where the source is not followed, all of them are left.
    pub fn apply_payloads<'a>(
        &self,
        name: &Name,
        payloads: impl IntoIterator<Item = &'a [u8]>,
        first_seq: u64,
    ) -> Applied {
        let mut payloads = payloads.into_iter();
        let mut done = Applied::default();
        let plain = std::iter::from_fn(|| match decode_batch(payloads.next()?) {
            Ok(batch)
                if u64::from(batch.rank.unwrap_or(0)) == name.1 && batch.discards.is_empty() && !batch.clears() =>
            {
                done.payloads += 1;
                done.events += batch.events.len();
                Some(batch.events)
            }
            other => {
                done.rest.push(other);
                None
            }
        });
        let last_seq = |count: usize| Some(first_seq.saturating_add(count.checked_sub(1)? as u64));
        // a source that is forgotten meanwhile takes with it what was applied: whoever applies the rest is told
        let _ = self.apply_each(name, plain, last_seq);
        done.rest.extend(payloads.map(decode_batch));
        done
    }

    /// Applies the events of a source, batch by batch, in order.
    pub fn apply<'a>(
        &self,
        name: &Name,
        batches: impl IntoIterator<Item = &'a [Event]>,
        last_seq: Option<u64>,
    ) -> Result<(), Refusal> {
        self.apply_each(name, batches, |_| last_seq)
    }

    /// Applies batches as they come; `last_seq` is asked for the number of the last message when it is known how many.
    fn apply_each(
        &self,
        name: &Name,
        batches: impl IntoIterator<Item: AsRef<[Event]>>,
        last_seq: impl FnOnce(usize) -> Option<u64>,
    ) -> Result<(), Refusal> {
        let tracked = self.require(name)?;
        let elsewhere = |name| self.find_elsewhere(&tracked.model, name);
        let elsewhere: &dyn Fn(EngineHash) -> Option<Known> = &elsewhere;
        let mut dead = Vec::new();
        let mut ledger = tracked.ledger.lock();
        if ledger.gone {
            return Err(Refusal::NotRegistered);
        }
        if tracked.fleet_wide {
            tracked.wanting.store(true, Ordering::SeqCst);
        }
        let shared = self.shared_with(&tracked);
        let here = self.here(tracked.fleet_wide.then_some(elsewhere));
        let mut applied = 0;
        'batches: for batch in batches {
            applied += 1;
            for event in batch.as_ref() {
                match event {
                    Event::Stored(event) => {
                        count(&self.counters.stored, event.block_hashes.len());
                        if event.bare_images && !self.bare_models.read().contains(&tracked.model) {
                            self.bare_models.write().insert(tracked.model.clone());
                        }
                        let released = ledger.store(event, &here);
                        if shared.iter().any(|other| other.wanting.load(Ordering::SeqCst)) {
                            let known: Vec<(EngineHash, Known)> = (event.block_hashes.iter().chain(&released))
                                .filter_map(|name| Some((*name, ledger.find(*name, 0, self.secret)?)))
                                .collect();
                            ledger.settle(&here);
                            self.settle(&tracked, &mut ledger);
                            MutexGuard::unlocked(&mut ledger, || self.tell(&shared, &known));
                            if ledger.gone {
                                break 'batches;
                            }
                        }
                    }
                    Event::Removed(event) => {
                        count(&self.counters.removed, event.block_hashes.len());
                        ledger.remove(event, &here);
                    }
                    Event::Cleared => {
                        count(&self.counters.cleared, 1);
                        ledger.settle(&here);
                        dead.push(self.renew(&tracked, &mut ledger, true));
                    }
                }
            }
        }
        ledger.settle(&here);
        self.settle(&tracked, &mut ledger);
        if let Some(seq) = last_seq(applied) {
            tracked.after_seq.store(seq.saturating_add(1), Ordering::Relaxed);
        }
        let gone = ledger.gone;
        drop(ledger);
        self.reclaim_all(dead);
        self.keep_bound();
        if gone { Err(Refusal::NotRegistered) } else { Ok(()) }
    }

    /// The shared caches that a source's blocks may lie in.
    fn shared_with(&self, tracked: &Tracked) -> Vec<Arc<Tracked>> {
        if self.fleet_wide.load(Ordering::SeqCst) <= usize::from(tracked.fleet_wide) {
            return Vec::new();
        }
        self.in_order(&tracked.model, |other| other.fleet_wide && other.name != tracked.name)
    }

    /// Tells shared caches that wait for somebody to say a block's tokens.
    fn tell(&self, shared: &[Arc<Tracked>], known: &[(EngineHash, Known)]) {
        for other in shared.iter().filter(|other| other.wanting.load(Ordering::SeqCst)) {
            let mut ledger = other.ledger.lock();
            if ledger.gone {
                continue;
            }
            let here = self.here(None);
            for (name, known) in known {
                ledger.place(*name, *known, &here);
            }
            ledger.settle(&here);
            self.settle(other, &mut ledger);
        }
    }

    pub(super) fn find_elsewhere(&self, model: &Arc<str>, name: EngineHash) -> Option<Known> {
        let others = self.in_order(model, |other| !other.fleet_wide);
        others.iter().find_map(|other| other.ledger.lock().find(name, 0, self.secret))
    }
}
