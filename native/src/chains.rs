//! From the slots of a model's sources to the chains that each of them reads: the twin of `indexer/chains.py`.

use std::cmp::Reverse;
use std::sync::Arc;

use hashbrown::{HashMap, HashSet};

use crate::groups::GroupSpec;
use crate::holders::SlotId;
use crate::ledger::{Slot, Tier};

/// A slot as a reader needs it.
#[derive(Clone)]
pub struct SlotView {
    pub id: SlotId,
    pub medium: Arc<str>,
    pub tier: Tier,
    pub group: Option<u32>,
    pub block_size: u32,
}

impl From<&Slot> for SlotView {
    fn from(slot: &Slot) -> Self {
        Self {
            id: slot.id,
            medium: slot.medium.clone(),
            tier: slot.tier,
            group: slot.group,
            block_size: slot.block_size,
        }
    }
}

/// What serves one cache group of one source.
pub struct Group {
    pub spec: GroupSpec,
    pub slots: Vec<SlotView>,
}

/// Groups that a source reads together: a prefix must be served by all of them.
pub struct Chain {
    pub groups: Vec<Group>,
}

impl Chain {
    /// One slot that must hold every block from the start: the common and fast case.
    pub fn single_slot(&self) -> Option<&SlotView> {
        match &self.groups[..] {
            [Group { spec: GroupSpec { tail: None, .. }, slots }] if slots.len() == 1 => slots.first(),
            _ => None,
        }
    }

    pub fn has_size(&self, size: u32) -> bool {
        self.groups.iter().any(|group| group.spec.block_size == size)
    }
}

/// A source as a reader needs it.
pub struct Cache<S> {
    pub source: S,
    pub slots: Vec<SlotView>,
    pub groups: Vec<(u32, GroupSpec)>,
    pub fleet_wide: bool,
}

/// A source and all its chains.
pub struct Reader<S> {
    pub source: S,
    pub chains: Vec<Chain>,
}

/// Says how the sources of one model are read, by no more block sizes than that many.
pub fn readers_of<S>(caches: Vec<Cache<S>>, block_sizes: usize) -> Vec<Reader<S>> {
    let sizes = common_sizes(&caches, block_sizes);
    let is_shared = caches.iter().filter(|cache| cache.fleet_wide);
    let shared: Vec<SlotView> = is_shared.flat_map(|cache| cache.slots.iter().cloned()).collect();
    let readers = caches.into_iter().filter(|cache| !cache.fleet_wide).map(|cache| {
        let slots = cache.slots.into_iter().chain(shared.iter().cloned());
        let slots = slots.filter(|slot| sizes.contains(&slot.block_size)).collect();
        Reader { source: cache.source, chains: chains_of(slots, &cache.groups) }
    });
    readers.collect()
}

/// The block sizes that the most sources use. By sources, not by blocks: their number depends on the layout alone, and no
/// source has more than its one vote.
fn common_sizes<S>(caches: &[Cache<S>], most: usize) -> Vec<u32> {
    let mut votes: HashMap<u32, (usize, usize)> = HashMap::new();
    for cache in caches {
        let sizes: HashSet<(u32, bool)> =
            cache.slots.iter().map(|slot| (slot.block_size, slot.tier == Tier::Gpu)).collect();
        for (size, is_first) in &sizes {
            let (first, all) = votes.entry(*size).or_default();
            *first += usize::from(*is_first);
            *all += usize::from(*is_first || !sizes.contains(&(*size, true)));
        }
    }
    // a prompt's last chunk is smaller than a whole one, and of any size (WIRE B1a): those must not push out the others
    let mut sizes: Vec<(usize, usize, u32)> =
        votes.into_iter().map(|(size, (first, all))| (first, all, size)).collect();
    sizes.sort_unstable_by_key(|votes| Reverse(*votes));
    sizes.truncate(most);
    sizes.into_iter().map(|(_, _, size)| size).collect()
}

/// The block size that most of these sources use on their first tier.
pub fn usual_block_size<S>(caches: &[Cache<S>]) -> Option<u32> {
    let mut sizes: HashMap<u32, usize> = HashMap::new();
    for Cache { slots, groups, .. } in caches {
        let of_group = groups.iter().find(|(_, spec)| spec.tail.is_none()).map(|(_, spec)| spec.block_size);
        let on_gpu = || slots.iter().find(|slot| slot.tier == Tier::Gpu).map(|slot| slot.block_size);
        let any = || slots.first().map(|slot| slot.block_size);
        if let Some(size) = of_group.or_else(on_gpu).or_else(any) {
            *sizes.entry(size).or_default() += 1;
        }
    }
    sizes.into_iter().max_by_key(|(size, sources)| (*sources, Reverse(*size))).map(|(size, _)| size)
}

/// Says how a source reads its slots, given the cache groups that it announced.
fn chains_of(mut slots: Vec<SlotView>, groups: &[(u32, GroupSpec)]) -> Vec<Chain> {
    let mut chains = Vec::new();
    let mut single_group = groups;
    if groups.len() > 1 {
        // publishers that name no group (offloading) hold blocks of the group that sees the whole prompt
        let first = groups.iter().map(|(number, spec)| (spec.tail.is_some(), *number)).min().map(|(_, number)| number);
        let chain = groups.iter().map(|(number, spec)| {
            let mine = |slot: &&SlotView| {
                slot.block_size == spec.block_size
                    && (slot.group == Some(*number) || slot.group.is_none() && Some(*number) == first)
            };
            Group { spec: *spec, slots: slots.iter().filter(mine).cloned().collect() }
        });
        chains.push(Chain { groups: chain.collect() });
        let is_grouped = |size: u32| groups.iter().any(|(_, spec)| spec.block_size == size);
        slots.retain(|slot| slot.group.is_none() && slot.tier != Tier::Gpu && !is_grouped(slot.block_size));
        single_group = &[];
    }
    let mut sizes: Vec<u32> = slots.iter().map(|slot| slot.block_size).collect();
    sizes.sort_unstable();
    sizes.dedup();
    for size in sizes {
        let known = single_group.iter().map(|(_, spec)| *spec).find(|spec| spec.block_size == size);
        let spec = known.unwrap_or(GroupSpec { block_size: size, tail: None });
        let mine = slots.iter().filter(|slot| slot.block_size == size).cloned().collect();
        chains.push(Chain { groups: vec![Group { spec, slots: mine }] });
    }
    chains
}
