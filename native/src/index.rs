//! Which source holds which blocks: the twin of `indexer/memory.py`.
//!
//! Who locks what, in the order in which locks may be taken:
//!
//! 1. A source's `ledger`: its one writer at a time, and now and then somebody who counts. A source that the whole fleet
//!    shares may look into the ledgers of others while it has its own; never the reverse.
//! 2. All others, for a moment, with nothing taken inside: `sources`, `views`, `bare_models`, a source's `trouble`, the
//!    numbers of `slots`, and a shard of `blocks`, which alone may be held while the table of holder sets is taken.
//!
//! A question reads the blocks without a lock, and finds the sources and slots of its model in an immutable `View`. It
//! takes ledgers only where it is the first after some layout changed and has to make the view anew: a view says which
//! layout it was made from. Slots are used anew only after their last block is gone and was counted as given back; an
//! answer that was worked out meanwhile is worked out again.

mod applying;
mod asking;
mod bounds;
mod snapshot;
mod tracked;

use std::any::Any;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use hashbrown::{HashMap, HashSet};
use parking_lot::{Mutex, RwLock};

pub use self::applying::Applied;
pub use self::asking::Holding;
use self::asking::View;
pub use self::tracked::{Status, Tracked};
use crate::blocks::Blocks;
use crate::counters::{Counters, count};
use crate::events::EngineHash;
use crate::ledger::{Here, Known, Ledger, Limits};
use crate::slots::Slots;

/// The pod and the data-parallel rank of a source.
pub type Name = (Arc<str>, u64);

/// Why a source cannot be followed, or that it is not.
#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    TooManySources,
    NotRegistered,
}

/// See the module.
pub struct Index {
    limits: Limits,
    secret: u64,
    blocks: Blocks,
    pub counters: Counters,
    sources: RwLock<HashMap<Name, Arc<Tracked>>>,
    registered: AtomicU64,
    fleet_wide: AtomicUsize,
    slots: Slots,
    views: RwLock<HashMap<Arc<str>, Arc<View>>>,
    bare_models: RwLock<HashSet<Arc<str>>>,
    ledger_bytes: AtomicUsize,
}

impl Index {
    pub fn new(limits: Limits) -> Self {
        let random = RandomState::new();
        Self {
            limits,
            secret: random.hash_one(1u8) | 1,
            blocks: Blocks::new(random.hash_one(2u8)),
            counters: Counters::default(),
            sources: RwLock::default(),
            registered: AtomicU64::new(0),
            fleet_wide: AtomicUsize::new(0),
            slots: Slots::default(),
            views: RwLock::default(),
            bare_models: RwLock::default(),
            ledger_bytes: AtomicUsize::new(0),
        }
    }

    /// Begins to follow a source; says no where it is followed already, and nothing changes. `label` is called for a
    /// new one.
    pub fn register(
        &self,
        name: Name,
        model: &str,
        counted: bool,
        fleet_wide: bool,
        label: impl FnOnce() -> Box<dyn Any + Send + Sync>,
    ) -> Result<bool, Refusal> {
        let mut sources = self.sources.write();
        if sources.contains_key(&name) {
            return Ok(false);
        }
        if sources.len() >= self.limits.max_sources {
            return Err(Refusal::TooManySources);
        }
        let known = sources.values().find(|other| *other.model == *model).map(|other| other.model.clone());
        let model = known.unwrap_or_else(|| model.into());
        let tracked = Arc::new(Tracked {
            ledger: Mutex::new(Ledger::new(model.clone(), counted, self.limits.parked_blocks, Vec::new())),
            name: name.clone(),
            model,
            fleet_wide,
            label: label(),
            counted,
            number: self.registered.fetch_add(1, Ordering::Relaxed),
            incarnation: AtomicU64::new(1),
            after_seq: AtomicU64::new(0),
            wanting: AtomicBool::new(false),
            is_degraded: AtomicBool::new(false),
            trouble: RwLock::default(),
        });
        self.fleet_wide.fetch_add(usize::from(fleet_wide), Ordering::SeqCst);
        sources.insert(name, tracked);
        self.slots.change_layout();
        Ok(true)
    }

    fn require(&self, name: &Name) -> Result<Arc<Tracked>, Refusal> {
        self.sources.read().get(name).cloned().ok_or(Refusal::NotRegistered)
    }

    fn here<'a>(&'a self, elsewhere: Option<&'a dyn Fn(EngineHash) -> Option<Known>>) -> Here<'a> {
        Here {
            blocks: &self.blocks,
            counters: &self.counters,
            limits: &self.limits,
            secret: self.secret,
            slots: &self.slots,
            elsewhere,
        }
    }

    /// Brings what others read of a source up to its ledger. Before the ledger's lock is let go.
    fn settle(&self, tracked: &Tracked, ledger: &mut Ledger) {
        if ledger.gone {
            return;
        }
        let bytes = ledger.bytes();
        self.ledger_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.ledger_bytes.fetch_sub(ledger.accounted, Ordering::Relaxed);
        ledger.accounted = bytes;
        if tracked.fleet_wide {
            tracked.wanting.store(ledger.waiting.has_unplaced(), Ordering::SeqCst);
        }
        tracked.note_ledger(ledger);
    }

    /// The sources of a model that are `wanted`, in the order of their registration.
    fn in_order(&self, model: &str, wanted: impl Fn(&Tracked) -> bool) -> Vec<Arc<Tracked>> {
        let sources = self.sources.read();
        let mine = sources.values().filter(|other| *other.model == *model && wanted(other));
        let mut mine: Vec<Arc<Tracked>> = mine.cloned().collect();
        mine.sort_unstable_by_key(|tracked| tracked.number);
        mine
    }

    /// Starts an incarnation and gives the ledger of the one before.
    fn renew(&self, tracked: &Tracked, ledger: &mut Ledger, keep_groups: bool) -> Ledger {
        let groups = if keep_groups { std::mem::take(&mut ledger.groups) } else { Vec::new() };
        let next = Ledger::new(tracked.model.clone(), tracked.counted, self.limits.parked_blocks, groups);
        tracked.incarnation.fetch_add(1, Ordering::Relaxed);
        let before = std::mem::replace(ledger, next);
        self.slots.change_layout();
        before
    }

    /// Forgets everything a source holds, and how its cache is laid out.
    pub fn restart(&self, name: &Name) -> Result<(), Refusal> {
        let tracked = self.require(name)?;
        count(&self.counters.restarts, 1);
        let mut ledger = tracked.ledger.lock();
        if ledger.gone {
            return Err(Refusal::NotRegistered);
        }
        let dead = self.renew(&tracked, &mut ledger, false);
        self.settle(&tracked, &mut ledger);
        drop(ledger);
        self.reclaim_all([dead]);
        Ok(())
    }

    /// Says why answers about a source may be wrong; "" says that they are exact again.
    pub fn degrade(&self, name: &Name, reason: &str) -> Result<(), Refusal> {
        let tracked = self.require(name)?;
        tracked.set_trouble(|trouble| {
            if *trouble.reason != *reason {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                trouble.since = if reason.is_empty() { 0.0 } else { now.as_secs_f64() };
                trouble.reason = reason.into();
            }
        });
        Ok(())
    }

    /// Counts one copy of each of these blocks, where more were counted; says no where cache groups decide.
    pub fn recount(&self, name: &Name, keys: &[u64]) -> Result<bool, Refusal> {
        let tracked = self.require(name)?;
        let mut ledger = tracked.ledger.lock();
        if ledger.gone {
            return Err(Refusal::NotRegistered);
        }
        Ok(ledger.recount(&keys.iter().copied().collect(), &self.here(None)))
    }

    /// Counts the copies that `recount` would take.
    pub fn surplus(&self, name: &Name, keys: &[u64]) -> Result<usize, Refusal> {
        let tracked = self.require(name)?;
        let ledger = tracked.ledger.lock();
        Ok(ledger.surplus(&keys.iter().copied().collect(), self.secret))
    }

    /// Stops following all sources of a pod and gives their memory back.
    pub fn forget(&self, pod: &str) {
        let mut gone = Vec::new();
        let mut sources = self.sources.write();
        sources.retain(|name, tracked| {
            let mine = *name.0 == *pod;
            if mine {
                gone.push(tracked.clone());
            }
            !mine
        });
        drop(sources);
        self.let_go(gone);
    }

    fn let_go(&self, gone: Vec<Arc<Tracked>>) {
        for tracked in gone {
            self.fleet_wide.fetch_sub(usize::from(tracked.fleet_wide), Ordering::SeqCst);
            let mut ledger = tracked.ledger.lock();
            let dead = self.renew(&tracked, &mut ledger, false);
            ledger.gone = true; // for a writer that found the source a moment ago
            drop(ledger);
            self.reclaim_all([dead]);
        }
    }

    /// Forgets everything.
    pub fn close(&self) {
        let gone = std::mem::take(&mut *self.sources.write());
        self.let_go(gone.into_values().collect());
        self.views.write().clear();
    }

    fn all(&self) -> Vec<Arc<Tracked>> {
        self.sources.read().values().cloned().collect()
    }

    /// Describes all sources that are followed, by name.
    pub fn sources(&self) -> Vec<Status> {
        let mut all = self.all();
        all.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        all.into_iter().map(Status::of).collect()
    }

    /// Gauges, and the counter of what waited too long, by name.
    pub fn gauges(&self) -> Vec<(&'static str, u64)> {
        let (mut held, mut waiting, mut dropped) = (0, 0, 0);
        let all = self.all();
        for tracked in &all {
            let ledger = tracked.ledger.lock();
            held += ledger.len() as u64;
            waiting += ledger.waiting.blocks as u64;
            dropped += ledger.waiting.dropped;
        }
        vec![
            ("blocks", self.blocks.len() as u64),
            ("held", held),
            ("waiting", waiting),
            ("waiting_dropped_total", dropped),
            ("sources", all.len() as u64),
            ("bytes", self.bytes() as u64),
        ]
    }

    /// Blocks that somebody holds, and sources that are followed.
    pub fn counts(&self) -> (usize, usize) {
        (self.blocks.len(), self.sources.read().len())
    }
}
