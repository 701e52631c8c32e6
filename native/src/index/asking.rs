//! Questions, and the views that answer them.

use std::collections::HashSet;
use std::sync::Arc;

use super::{Index, Tracked};
use crate::chains::{self, Cache, Chain, SlotView, readers_of, usual_block_size};
use crate::matching::{Found, NOTHING, Plan, answer};
use crate::prompt::Asked;

/// One source's share of an answer.
pub struct Holding {
    pub tracked: Arc<Tracked>,
    pub found: Found,
}

type Reader = chains::Reader<Arc<Tracked>>;

/// The sources of one model.
pub(super) struct View {
    layout: u64,
    readers: Vec<Reader>,
    /// For a question about all of them.
    plan: Plan,
    block_size: Option<u32>,
}

impl Index {
    /// Says what each source of a model holds of a prompt, those that hold nothing included where `all` says so.
    pub fn holdings(
        &self,
        asked: &mut Asked,
        pods: Option<&HashSet<String>>,
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
}
