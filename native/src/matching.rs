//! From the holders of each block of a prompt to what each source holds of it: the twin of `indexer/matching.py`.
//!
//! Sources that hold a model's blocks in one slot need no more than "where did my slot first miss"; the others are worked
//! out from the places where the holders change.

use std::sync::Arc;

use crate::blocks::Blocks;
use crate::chains::{Chain, SlotView};
use crate::groups::{GroupBlocks, GroupSpec, longest_prefix};
use crate::prompt::Asked;
use crate::scan::{Scan, Wanted, holds};

/// What has to be looked up for some readers, laid out for looking up.
#[derive(Default)]
pub struct Plan {
    sizes: Vec<Wanted>,
    readers: Vec<Vec<ChainPlan>>,
}

enum ChainPlan {
    Single { size: usize, place: usize, medium: Arc<str> },
    Groups(Vec<GroupPlan>),
}

struct GroupPlan {
    spec: GroupSpec,
    size: usize,
    /// Bit and medium of each slot.
    slots: Vec<(usize, Arc<str>)>,
}

impl Plan {
    /// `size` asks only for chains that have blocks of that size.
    pub fn new(readers: &[&[Chain]], size: Option<u32>) -> Self {
        let asked: Vec<Vec<&Chain>> = readers
            .iter()
            .map(|chains| chains.iter().filter(|chain| size.is_none_or(|size| chain.has_size(size))).collect())
            .collect();
        let mut plan = Self::default();
        for chain in asked.iter().flatten() {
            plan.add_slots(chain);
        }
        for size in &mut plan.sizes {
            for slots in [&mut size.singles, &mut size.others] {
                slots.sort_unstable();
                slots.dedup();
            }
        }
        for chain in asked.iter().flatten() {
            plan.add_needs(chain);
        }
        plan.readers = asked.iter().map(|chains| chains.iter().map(|chain| plan.chain_plan(chain)).collect()).collect();
        plan
    }

    fn size_at(&mut self, size: u32) -> &mut Wanted {
        let known = self.sizes.iter().position(|plan| plan.size == size);
        let place = known.unwrap_or_else(|| {
            let empty = Wanted { size, singles: vec![], others: vec![], needed: vec![], to_the_end: false };
            self.sizes.push(empty);
            self.sizes.len() - 1
        });
        &mut self.sizes[place]
    }

    fn add_slots(&mut self, chain: &Chain) {
        if let Some(slot) = chain.single_slot() {
            return self.size_at(slot.block_size).singles.push(slot.id);
        }
        for group in &chain.groups {
            self.size_at(group.spec.block_size).others.extend(group.slots.iter().map(|slot| slot.id));
        }
    }

    fn add_needs(&mut self, chain: &Chain) {
        if chain.single_slot().is_some() {
            return;
        }
        for plan in &mut self.sizes {
            let mut here = chain.groups.iter().filter(|group| group.spec.block_size == plan.size).peekable();
            if here.peek().is_none() {
                continue;
            }
            match here.find(|group| group.spec.tail.is_none()) {
                None => plan.to_the_end = true,
                Some(group) => {
                    let bits = group.slots.iter().filter_map(|slot| plan.others.binary_search(&slot.id).ok());
                    plan.needed.push(bits.collect());
                }
            }
        }
    }

    fn chain_plan(&self, chain: &Chain) -> ChainPlan {
        let size_of = |size: u32| self.sizes.iter().position(|plan| plan.size == size).unwrap_or(0);
        if let Some(slot) = chain.single_slot() {
            let size = size_of(slot.block_size);
            let place = self.sizes[size].singles.binary_search(&slot.id).unwrap_or(0);
            return ChainPlan::Single { size, place, medium: slot.medium.clone() };
        }
        let groups = chain.groups.iter().map(|group| {
            let size = size_of(group.spec.block_size);
            let bit = |slot: &SlotView| self.sizes[size].others.binary_search(&slot.id).unwrap_or(0);
            let slots = group.slots.iter().map(|slot| (bit(slot), slot.medium.clone())).collect();
            GroupPlan { spec: group.spec, size, slots }
        });
        ChainPlan::Groups(groups.collect())
    }
}

/// Some tokens of a match, one after the other, that lie on the same media; these are sorted.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    pub tokens: u64,
    pub media: Vec<Arc<str>>,
}

/// Where a match lies.
#[derive(Clone, Debug, PartialEq)]
pub enum Runs {
    Nowhere,
    /// All of it on one medium.
    One(Arc<str>),
    Many(Vec<Run>),
}

/// What one source holds of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    pub tokens: u64,
    pub reusable: u64,
    pub runs: Runs,
}

pub const NOTHING: Found = Found { tokens: 0, reusable: 0, runs: Runs::Nowhere };

/// Says what each reader of the plan holds of a prompt. `bare` also looks under keys that name images without place.
pub fn answer(plan: &Plan, blocks: &Blocks, asked: &mut Asked, bare: bool) -> Vec<Found> {
    let mut found = look_up(plan, blocks, asked, false);
    if bare && !asked.keys.images.is_empty() {
        for (one, other) in found.iter_mut().zip(look_up(plan, blocks, asked, true)) {
            if other.tokens > one.tokens {
                *one = other;
            }
        }
    }
    found
}

fn look_up(plan: &Plan, blocks: &Blocks, asked: &mut Asked, bare: bool) -> Vec<Found> {
    let scans: Vec<Scan> = plan.sizes.iter().map(|size| Scan::of(size, blocks, asked, bare)).collect();
    let cap = asked.tokens.len().saturating_sub(1) as u64;
    let evaluated = plan.readers.iter().map(|chains| {
        if let [chain] = &chains[..] {
            return evaluate(chain, plan, &scans, cap);
        }
        let parts = chains.iter().map(|chain| evaluate(chain, plan, &scans, cap));
        let mut parts: Vec<Found> = parts.filter(|part| part.tokens > 0).collect();
        if parts.len() < 2 {
            return parts.pop().unwrap_or(NOTHING);
        }
        Found {
            tokens: parts.iter().map(|part| part.tokens).max().unwrap_or(0),
            reusable: parts.iter().map(|part| part.reusable).max().unwrap_or(0),
            runs: Runs::Many(merged(parts)),
        }
    });
    evaluated.collect()
}

fn evaluate(chain: &ChainPlan, plan: &Plan, scans: &[Scan], cap: u64) -> Found {
    let groups = match chain {
        ChainPlan::Single { size, place, medium } => {
            let (scan, width) = (&scans[*size], u64::from(plan.sizes[*size].size));
            let blocks = u64::from(scan.ends[*place]).min(scan.scanned as u64);
            if blocks == 0 {
                return NOTHING;
            }
            let reusable = blocks.min(cap / width) * width;
            return Found { tokens: blocks * width, reusable, runs: Runs::One(medium.clone()) };
        }
        ChainPlan::Groups(groups) => groups,
    };
    let held: Vec<GroupBlocks> = groups.iter().map(|group| blocks_of(group, &scans[group.size])).collect();
    let reach = |group: &GroupPlan| scans[group.size].scanned as u64 * u64::from(group.spec.block_size);
    let tokens = longest_prefix(&held, groups.iter().map(reach).max().unwrap_or(0));
    if tokens == 0 {
        return NOTHING;
    }
    let shown = groups.iter().find(|group| group.spec.tail.is_none()).unwrap_or(&groups[0]);
    let runs = runs_of(shown, &scans[shown.size], tokens);
    Found { tokens, reusable: longest_prefix(&held, tokens.min(cap)), runs: Runs::Many(runs) }
}

fn blocks_of(group: &GroupPlan, scan: &Scan) -> GroupBlocks {
    let mut spans: Vec<(u64, u64)> = Vec::new();
    for (start, end, bits) in scan.stretches() {
        if !group.slots.iter().any(|(bit, _)| holds(bits, *bit)) {
            continue;
        }
        match spans.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => spans.push((start, end)),
        }
    }
    GroupBlocks { spec: group.spec, spans }
}

/// Says where the first `tokens` lie. Blocks that a window does not need lie where the next one does.
fn runs_of(group: &GroupPlan, scan: &Scan, tokens: u64) -> Vec<Run> {
    let size = u64::from(group.spec.block_size);
    let (mut runs, mut covered) = (Vec::<Run>::new(), 0);
    for (_, end, bits) in scan.stretches() {
        let here = group.slots.iter().filter(|(bit, _)| holds(bits, *bit));
        let mut media: Vec<Arc<str>> = here.map(|(_, medium)| medium.clone()).collect();
        media.sort_unstable();
        media.dedup();
        let upto = (end * size).min(tokens);
        if media.is_empty() || upto <= covered {
            continue;
        }
        match runs.last_mut() {
            Some(last) if last.media == media => last.tokens += upto - covered,
            _ => runs.push(Run { tokens: upto - covered, media }),
        }
        covered = upto;
    }
    runs
}

/// Lays several descriptions of one prefix over each other.
fn merged(parts: Vec<Found>) -> Vec<Run> {
    let parts: Vec<Vec<Run>> = parts
        .into_iter()
        .map(|part| match part.runs {
            Runs::Nowhere => Vec::new(),
            Runs::One(medium) => vec![Run { tokens: part.tokens, media: vec![medium] }],
            Runs::Many(runs) => runs,
        })
        .collect();
    let mut edges = Vec::new();
    for runs in &parts {
        let mut place = 0;
        for run in runs {
            place += run.tokens;
            edges.push(place);
        }
    }
    edges.sort_unstable();
    edges.dedup();
    let (mut whole, mut start) = (Vec::new(), 0);
    for end in edges {
        let mut media = Vec::new();
        for runs in &parts {
            let mut place = 0;
            for run in runs {
                if place <= start && start < place + run.tokens {
                    media.extend(run.media.iter().cloned());
                }
                place += run.tokens;
            }
        }
        media.sort_unstable();
        media.dedup();
        whole.push(Run { tokens: end - start, media });
        start = end;
    }
    whole
}
