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

mod snapshot;

use std::any::Any;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_epoch::pin;
use hashbrown::{HashMap, HashSet};
use parking_lot::{Mutex, MutexGuard, RwLock};

use crate::blocks::{Blocks, Step};
use crate::chains::{self, Cache, Chain, SlotView, readers_of, usual_block_size};
use crate::events::{Batch, EngineHash, Event};
use crate::ledger::{Counters, Here, Known, Ledger, Limits, Slot, count};
use crate::matching::{Found, NOTHING, Plan, answer};
use crate::prompt::Asked;
use crate::slots::Slots;
use crate::wire::{DecodeError, decode_batch};

/// Blocks reclaimed at a time: a reader that came before waits no longer for memory than that takes.
const SWEEP: usize = 4096;

/// The pod and the data-parallel rank of a source.
pub type Name = (Arc<str>, u64);

/// Why a source cannot be followed, or that it is not.
#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    TooManySources,
    NotRegistered,
}

#[derive(Default)]
struct Trouble {
    reason: Arc<str>,
    since: f64,
    ledger: &'static str,
}

/// One source that is followed.
pub struct Tracked {
    pub name: Name,
    pub model: Arc<str>,
    pub fleet_wide: bool,
    /// What the caller of `register` wants to find again.
    pub label: Box<dyn Any + Send + Sync>,
    counted: bool,
    /// In which order sources were registered.
    number: u64,
    incarnation: AtomicU64,
    /// The number of the last message, plus one; 0 where nobody said it.
    after_seq: AtomicU64,
    ledger: Mutex<Ledger>,
    /// Whether blocks may wait for somebody to say their tokens; set before the ledger looks elsewhere for them.
    wanting: AtomicBool,
    is_degraded: AtomicBool,
    trouble: RwLock<Trouble>,
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
    fn is_unreachable(&self) -> bool {
        self.degraded().is_some_and(|reason| reason.starts_with("unreachable"))
    }

    fn set_trouble(&self, change: impl FnOnce(&mut Trouble)) {
        let mut trouble = self.trouble.write();
        change(&mut trouble);
        self.is_degraded.store(!trouble.reason.is_empty() || !trouble.ledger.is_empty(), Ordering::Relaxed);
    }

    fn note_ledger(&self, ledger: &Ledger) {
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

type Reader = chains::Reader<Arc<Tracked>>;

/// The sources of one model.
struct View {
    layout: u64,
    readers: Vec<Reader>,
    /// For a question about all of them.
    plan: Plan,
    block_size: Option<u32>,
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

/// What became of payloads, see `Index::apply_payloads`.
#[derive(Debug, Default)]
pub struct Applied {
    pub payloads: usize,
    /// How many events they had.
    pub events: usize,
    /// The others, decoded.
    pub rest: Vec<Result<Batch, DecodeError>>,
}

/// One source's share of an answer.
pub struct Holding {
    pub tracked: Arc<Tracked>,
    pub found: Found,
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

    fn find_elsewhere(&self, model: &Arc<str>, name: EngineHash) -> Option<Known> {
        let others = self.in_order(model, |other| !other.fleet_wide);
        others.iter().find_map(|other| other.ledger.lock().find(name, 0, self.secret))
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

    /// Takes the slots of ledgers that are no longer in use out of the table, in small steps.
    fn reclaim_all(&self, ledgers: impl IntoIterator<Item = Ledger>) {
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

    fn keep_bound(&self) {
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
            (!ledger.is_empty()).then_some((ledger.bytes(), std::cmp::Reverse(tracked.number)))
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

    /// Says what each source of a model holds of a prompt, those that hold nothing included where `all` says so.
    pub fn holdings(
        &self,
        asked: &mut Asked,
        pods: Option<&std::collections::HashSet<String>>,
        size: Option<u32>,
        all: bool,
    ) -> Vec<Holding> {
        loop {
            let reused = self.slots.given_back();
            let Some(view) = self.view(&asked.keys.model) else { return Vec::new() };
            let bare = self.bare_models.read().contains(&*asked.keys.model);
            let wanted = |reader: &&Reader| pods.is_none_or(|pods| pods.contains(&*reader.source.name.0));
            let readers: Vec<&Reader> = view.readers.iter().filter(wanted).collect();
            let found = if readers.len() == view.readers.len() && size.is_none() {
                answer(&view.plan, &self.blocks, asked, bare)
            } else {
                let chains: Vec<&[Chain]> = readers.iter().map(|reader| &reader.chains[..]).collect();
                answer(&Plan::new(&chains, size), &self.blocks, asked, bare)
            };
            if reused == self.slots.given_back() {
                let heard = |(reader, found): (&&Reader, Found)| {
                    let found = if reader.source.is_unreachable() { NOTHING } else { found };
                    Holding { tracked: reader.source.clone(), found }
                };
                let holdings = readers.iter().zip(found).map(heard);
                return holdings.filter(|holding| all || holding.found.tokens > 0).collect();
            }
        }
    }

    /// The block size that most sources of a model use on their first tier.
    pub fn block_size(&self, model: &str) -> Option<u32> {
        self.view(model)?.block_size
    }

    fn view(&self, model: &str) -> Option<Arc<View>> {
        let layout = self.slots.layout();
        if let Some(view) = self.views.read().get(model)
            && view.layout == layout
        {
            return Some(view.clone());
        }
        let mine = self.in_order(model, |_| true);
        let Some(model) = mine.first().map(|tracked| tracked.model.clone()) else {
            self.views.write().remove(model);
            return None;
        };
        let view = Arc::new(self.make_view(layout, &mine));
        self.views.write().insert(model, view.clone());
        Some(view)
    }

    fn make_view(&self, layout: u64, mine: &[Arc<Tracked>]) -> View {
        let cache_of = |tracked: &Arc<Tracked>| {
            let ledger = tracked.ledger.lock();
            let slots = ledger.slots.iter().map(SlotView::from).collect();
            Cache { source: tracked.clone(), slots, groups: ledger.groups.clone(), fleet_wide: tracked.fleet_wide }
        };
        let caches: Vec<_> = mine.iter().map(cache_of).collect();
        let block_size = usual_block_size(&caches);
        let readers = readers_of(caches, self.limits.block_sizes);
        let chains: Vec<&[Chain]> = readers.iter().map(|reader| &reader.chains[..]).collect();
        let plan = Plan::new(&chains, None);
        View { layout, plan, readers, block_size }
    }

    /// Describes all sources that are followed, by name.
    pub fn sources(&self) -> Vec<Status> {
        let mut all = self.all();
        all.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        all.into_iter().map(Self::status).collect()
    }

    fn status(tracked: Arc<Tracked>) -> Status {
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
        Status { tracked, incarnation, tiers, block_sizes, degraded, degraded_since, last_seq }
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
