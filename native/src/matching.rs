//! From the holders of each block of a prompt to what each source holds of it: the twin of `indexer/matching.py`.
//!
//! Along a prompt the holders change rarely, and equal words mean equal holders, so a look-up does work only where the
//! word changes. Sources that hold a model's blocks in one slot need no more than "where did my slot first miss"; the
//! others are worked out from the places where the holders change.

use std::sync::Arc;

use crossbeam_epoch::pin;

use crate::blocks::Blocks;
use crate::groups::{GroupBlocks, GroupSpec, longest_prefix};
use crate::holders::{SlotId, slots_of};
use crate::ledger::{Slot, Tier};
use crate::prompt::PromptKeys;

const FIRST_CHUNK: usize = 64;
const LARGEST_CHUNK: usize = 1024;
/// How many keys ahead of its look-up a row is asked for.
const AHEAD: usize = 16;

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
struct Group {
    spec: GroupSpec,
    slots: Vec<SlotView>,
}

/// Groups that a source reads together: a prefix must be served by all of them.
pub struct Chain {
    groups: Vec<Group>,
}

impl Chain {
    /// One slot that must hold every block from the start: the common and fast case.
    fn single_slot(&self) -> Option<&SlotView> {
        match &self.groups[..] {
            [Group { spec: GroupSpec { tail: None, .. }, slots }] if slots.len() == 1 => slots.first(),
            _ => None,
        }
    }

    fn has_size(&self, size: u32) -> bool {
        self.groups.iter().any(|group| group.spec.block_size == size)
    }
}

/// Says how a source reads its slots, given the cache groups that it announced.
pub fn chains_of(mut slots: Vec<SlotView>, groups: &[(u32, GroupSpec)]) -> Vec<Chain> {
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

/// What has to be looked up for some readers, laid out for looking up.
#[derive(Default)]
pub struct Plan {
    sizes: Vec<SizePlan>,
    readers: Vec<Vec<ChainPlan>>,
}

/// The blocks of one size.
struct SizePlan {
    size: u32,
    /// Slots of single-slot chains, in order.
    singles: Vec<SlotId>,
    /// Slots of other chains, in order. Their places here are their bits.
    others: Vec<SlotId>,
    /// For each other chain with a group that needs every block: the bits of which one must be there.
    needed: Vec<Vec<usize>>,
    /// Whether the whole prompt has to be looked at.
    to_the_end: bool,
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

    fn size_at(&mut self, size: u32) -> &mut SizePlan {
        let known = self.sizes.iter().position(|plan| plan.size == size);
        let place = known.unwrap_or_else(|| {
            let empty = SizePlan { size, singles: vec![], others: vec![], needed: vec![], to_the_end: false };
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

/// The tokens of a prompt, and its keys.
pub struct Asked<'a> {
    pub tokens: &'a [u32],
    pub keys: &'a mut PromptKeys,
}

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

/// The holders along a prompt's blocks of one size.
struct Scan {
    /// For each slot of a single-slot chain: how many leading blocks it holds, `NO_END` where it holds all scanned.
    ends: Vec<u32>,
    /// First block of each stretch of blocks with the same holders among the others.
    changes: Vec<u32>,
    /// The holders of each stretch, `words` words of bits each.
    bits: Vec<u64>,
    words: usize,
    scanned: usize,
}

const NO_END: u32 = u32::MAX;

impl Scan {
    fn of(plan: &SizePlan, blocks: &Blocks, asked: &mut Asked, bare: bool) -> Self {
        let words = plan.others.len().div_ceil(64);
        let total = (asked.tokens.len() / plan.size as usize).min(NO_END as usize);
        let ends = vec![NO_END; plan.singles.len()];
        let mut scan = Self { ends, changes: Vec::new(), bits: Vec::new(), words, scanned: total };
        let mut alive: Vec<(SlotId, u32)> = plan.singles.iter().copied().zip(0..).collect();
        let mut needed: Vec<&[usize]> = plan.needed.iter().map(Vec::as_slice).filter(|bits| !bits.is_empty()).collect();
        let mut now = vec![0; words];
        let (mut done, mut chunk, mut before) = (0, FIRST_CHUNK, None);
        while done < total {
            let upto = total.min(done + chunk);
            let keys = &asked.keys.keys(asked.tokens, plan.size, upto, bare)[done..upto];
            let guard = &pin();
            for key in keys.iter().take(AHEAD) {
                blocks.prefetch(*key, guard);
            }
            // words of another chunk were read under another guard, and their sets may be gone
            before = before.filter(|word| word & 3 != 0);
            for (number, key) in keys.iter().enumerate() {
                if let Some(ahead) = keys.get(number + AHEAD) {
                    blocks.prefetch(*ahead, guard);
                }
                let word = blocks.holders(*key, guard);
                if before == Some(word) {
                    continue;
                }
                before = Some(word);
                let number = done + number;
                let holders = slots_of(word, guard);
                scan.lose(&mut alive, holders.as_slice(), number as u32);
                if words > 0 && scan.change(plan, &mut now, holders.as_slice(), number as u32) {
                    needed.retain(|bits| bits.iter().any(|bit| now[bit / 64] >> (bit % 64) & 1 == 1));
                }
                if alive.is_empty() && needed.is_empty() && !plan.to_the_end {
                    scan.scanned = number + 1;
                    return scan;
                }
            }
            done = upto;
            chunk = LARGEST_CHUNK.min(2 * chunk);
        }
        scan
    }

    /// Notes which of the slots that held all blocks so far do not hold this one.
    fn lose(&mut self, alive: &mut Vec<(SlotId, u32)>, holders: &[SlotId], number: u32) {
        let mut next = 0;
        alive.retain(|(slot, place)| {
            while holders.get(next).is_some_and(|holder| holder < slot) {
                next += 1;
            }
            let held = holders.get(next) == Some(slot);
            if !held {
                self.ends[*place as usize] = number;
            }
            held
        });
    }

    /// Notes the holders among the others where they are not those of the block before; says whether they changed.
    fn change(&mut self, plan: &SizePlan, now: &mut [u64], holders: &[SlotId], number: u32) -> bool {
        now.fill(0);
        let mut bit = 0;
        for holder in holders {
            while plan.others.get(bit).is_some_and(|slot| slot < holder) {
                bit += 1;
            }
            if plan.others.get(bit) == Some(holder) {
                now[bit / 64] |= 1 << (bit % 64);
            }
        }
        if !self.changes.is_empty() && self.bits[self.bits.len() - self.words..] == *now {
            return false;
        }
        self.changes.push(number);
        self.bits.extend_from_slice(now);
        true
    }

    /// Each stretch: its first block, the block after it, and which of the others hold it.
    fn stretches(&self) -> impl Iterator<Item = (u64, u64, &[u64])> {
        let ends = self.changes.iter().skip(1).map(|number| u64::from(*number)).chain([self.scanned as u64]);
        let starts = self.changes.iter().map(|number| u64::from(*number));
        starts.zip(ends).zip(self.bits.chunks(self.words.max(1))).map(|((start, end), bits)| (start, end, bits))
    }
}

fn holds(bits: &[u64], bit: usize) -> bool {
    bits.get(bit / 64).is_some_and(|word| word >> (bit % 64) & 1 == 1)
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
