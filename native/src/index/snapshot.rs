//! A source as bytes, and back.

use super::*;
use crate::columns::{Flaw, Reader, Writer};

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

impl Index {
    /// All sources, in the order in which they were registered.
    pub fn followed(&self) -> Vec<Arc<Tracked>> {
        let mut all = self.all();
        all.sort_unstable_by_key(|tracked| tracked.number);
        all
    }

    /// All that is known of a source, in the form of `indexer/sections.py`.
    pub fn dump(&self, name: &Name) -> Result<Vec<u8>, Refusal> {
        let tracked = self.require(name)?;
        let ledger = tracked.ledger.lock();
        if ledger.gone {
            return Err(Refusal::NotRegistered);
        }
        let mut out = Writer::default();
        out.bytes.reserve(4096 + 17 * ledger.len());
        out.text(&tracked.name.0);
        out.u64(tracked.name.1);
        out.text(&tracked.model);
        out.flag(tracked.counted);
        out.flag(tracked.fleet_wide);
        out.u64(tracked.incarnation.load(Ordering::Relaxed));
        let trouble = tracked.trouble.read();
        out.text(&trouble.reason);
        out.f64(trouble.since);
        drop(trouble);
        out.u64(tracked.after_seq.load(Ordering::Relaxed));
        out.flag(self.bare_models.read().contains(&tracked.model));
        out.f64(now());
        ledger.write(&mut out, self.secret);
        Ok(out.bytes)
    }

    /// Follows a source from where it was when `dump` was called.
    pub fn load(
        &self,
        bytes: &[u8],
        name: &Name,
        label: impl FnOnce() -> Box<dyn Any + Send + Sync>,
    ) -> Result<(), Flaw> {
        let mut from = Reader::new(bytes);
        if (from.text()?, from.u64()?) != (&*name.0, name.1) {
            return from.flaw("another source");
        }
        let (model, counted, fleet_wide) = (from.text()?, from.flag()?, from.flag()?);
        let (incarnation, reason, since) = (from.u64()?, from.text()?, from.f64()?);
        let (after_seq, is_bare, taken_at) = (from.u64()?, from.flag()?, from.f64()?);
        let mut ledger = Ledger::new(model.into(), counted, self.limits.parked_blocks, Vec::new());
        ledger.read(&mut from, &self.limits, self.secret, (now() - taken_at).max(0.0))?;
        match self.register(name.clone(), model, counted, fleet_wide, label) {
            Ok(true) => (),
            Ok(false) => return Err("the source is followed already".into()),
            Err(_) => return Err("more sources than Limits.max_sources".into()),
        }
        let tracked = self.require(name).map_err(|_| "the source was forgotten".to_string())?;
        let mut place = tracked.ledger.lock();
        ledger.model = tracked.model.clone();
        if let Err(flaw) = ledger.enter(&self.here(None)) {
            drop(place);
            self.sources.write().remove(name);
            self.fleet_wide.fetch_sub(usize::from(fleet_wide), Ordering::SeqCst);
            return Err(flaw);
        }
        *place = ledger;
        if is_bare {
            self.bare_models.write().insert(tracked.model.clone());
        }
        tracked.incarnation.store(incarnation, Ordering::Relaxed);
        tracked.after_seq.store(after_seq, Ordering::Relaxed);
        tracked.set_trouble(|trouble| (trouble.reason, trouble.since) = (reason.into(), since));
        self.slots.change_layout();
        self.settle(&tracked, &mut place);
        drop(place);
        self.keep_bound();
        Ok(())
    }

    /// Places what waits in shared caches and is known by now: sources are written one after the other, so a shared one
    /// may still wait for what another was told before that one was written.
    pub fn settle_shared(&self) {
        for tracked in self.followed().into_iter().filter(|tracked| tracked.fleet_wide) {
            let mut ledger = tracked.ledger.lock();
            let here = self.here(None);
            let mut names: Vec<EngineHash> = ledger.waiting.unplaced().iter().map(|(name, ..)| *name).collect();
            names.dedup(); // the copies of a name stand together
            for name in names {
                if let Some(known) = self.find_elsewhere(&tracked.model, name) {
                    ledger.place(name, known, &here);
                }
            }
            ledger.settle(&here);
            self.settle(&tracked, &mut ledger);
        }
    }
}
