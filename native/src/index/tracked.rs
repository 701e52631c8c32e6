//! One source that is followed, and how it stands.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use super::Name;
use crate::ledger::Ledger;

#[derive(Default)]
pub(super) struct Trouble {
    pub(super) reason: Arc<str>,
    pub(super) since: f64,
    pub(super) ledger: &'static str,
}

/// One source that is followed.
pub struct Tracked {
    pub name: Name,
    pub model: Arc<str>,
    pub fleet_wide: bool,
    /// What the caller of `register` wants to find again.
    pub label: Box<dyn Any + Send + Sync>,
    pub(super) counted: bool,
    /// In which order sources were registered.
    pub(super) number: u64,
    pub(super) incarnation: AtomicU64,
    /// The number of the last message, plus one; 0 where nobody said it.
    pub(super) after_seq: AtomicU64,
    pub(super) ledger: Mutex<Ledger>,
    /// Whether blocks may wait for somebody to say their tokens; set before the ledger looks elsewhere for them.
    pub(super) wanting: AtomicBool,
    pub(super) is_degraded: AtomicBool,
    pub(super) trouble: RwLock<Trouble>,
}

impl Tracked {
    /// Why answers may be wrong, None when they are exact.
    pub fn degraded(&self) -> Option<Arc<str>> {
        if !self.is_degraded.load(Ordering::Relaxed) {
            return None;
        }
        let trouble = self.trouble.read();
        let reason = if trouble.reason.is_empty() { trouble.ledger.into() } else { trouble.reason.clone() };
        (!reason.is_empty()).then_some(reason)
    }

    /// Whether nobody has heard of it for long: `UNREACHABLE` in indexer/base.py.
    pub(super) fn is_unreachable(&self) -> bool {
        self.degraded().is_some_and(|reason| reason.starts_with("unreachable"))
    }

    pub(super) fn set_trouble(&self, change: impl FnOnce(&mut Trouble)) {
        let mut trouble = self.trouble.write();
        change(&mut trouble);
        self.is_degraded.store(!trouble.reason.is_empty() || !trouble.ledger.is_empty(), Ordering::Relaxed);
    }

    pub(super) fn note_ledger(&self, ledger: &Ledger) {
        let degraded = ledger.degraded();
        if self.trouble.read().ledger != degraded {
            self.set_trouble(|trouble| trouble.ledger = degraded);
        }
    }
}

/// What is known about one source.
pub struct Status {
    pub tracked: Arc<Tracked>,
    pub incarnation: u64,
    pub tiers: Vec<(&'static str, usize)>,
    pub block_sizes: Vec<u32>,
    pub degraded: Option<Arc<str>>,
    pub degraded_since: f64,
    pub last_seq: Option<u64>,
}

impl Status {
    pub(super) fn of(tracked: Arc<Tracked>) -> Self {
        let mut tiers: Vec<(&'static str, usize)> = Vec::new();
        let mut block_sizes = Vec::new();
        {
            let ledger = tracked.ledger.lock();
            for slot in &ledger.slots {
                match tiers.iter_mut().find(|(tier, _)| *tier == slot.tier.name()) {
                    Some((_, blocks)) => *blocks += slot.len(),
                    None => tiers.push((slot.tier.name(), slot.len())),
                }
                block_sizes.push(slot.block_size);
            }
        }
        block_sizes.sort_unstable();
        block_sizes.dedup();
        let degraded = tracked.degraded();
        let degraded_since = if degraded.is_some() { tracked.trouble.read().since } else { 0.0 };
        let incarnation = tracked.incarnation.load(Ordering::Relaxed);
        let last_seq = tracked.after_seq.load(Ordering::Relaxed).checked_sub(1);
        Self { tracked, incarnation, tiers, block_sizes, degraded, degraded_since, last_seq }
    }
}
