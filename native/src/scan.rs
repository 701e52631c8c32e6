//! The holders along a prompt's blocks of one size: what is wanted of them, and what is found. The twin of
//! `indexer/scan.py`.
//!
//! Along a prompt the holders change rarely, and equal words mean equal holders, so a scan does work only where the word
//! changes.

use crossbeam_epoch::pin;

use crate::blocks::Blocks;
use crate::holders::{SlotId, slots_of};
use crate::prompt::Asked;

const FIRST_CHUNK: usize = 64;
const LARGEST_CHUNK: usize = 1024;
/// How many keys ahead of its look-up a row is asked for.
const AHEAD: usize = 16;

/// What is looked for among the blocks of one size.
pub struct Wanted {
    pub size: u32,
    /// Slots of single-slot chains, in order.
    pub singles: Vec<SlotId>,
    /// Slots of other chains, in order. Their places here are their bits.
    pub others: Vec<SlotId>,
    /// For each other chain with a group that needs every block: the bits of which one must be there.
    pub needed: Vec<Vec<usize>>,
    /// Whether the whole prompt has to be looked at.
    pub to_the_end: bool,
}

/// The holders along a prompt's blocks of one size.
pub struct Scan {
    /// For each slot of a single-slot chain: how many leading blocks it holds, `NO_END` where it holds all scanned.
    pub ends: Vec<u32>,
    /// First block of each stretch of blocks with the same holders among the others.
    changes: Vec<u32>,
    /// The holders of each stretch, `words` words of bits each.
    bits: Vec<u64>,
    words: usize,
    pub scanned: usize,
}

const NO_END: u32 = u32::MAX;

impl Scan {
    pub fn of(wanted: &Wanted, blocks: &Blocks, asked: &mut Asked, bare: bool) -> Self {
        let words = wanted.others.len().div_ceil(64);
        let total = (asked.tokens.len() / wanted.size as usize).min(NO_END as usize);
        let ends = vec![NO_END; wanted.singles.len()];
        let mut scan = Self { ends, changes: Vec::new(), bits: Vec::new(), words, scanned: total };
        let mut alive: Vec<(SlotId, u32)> = wanted.singles.iter().copied().zip(0..).collect();
        let mut needed: Vec<&[usize]> =
            wanted.needed.iter().map(Vec::as_slice).filter(|bits| !bits.is_empty()).collect();
        let mut now = vec![0; words];
        let (mut done, mut chunk, mut before) = (0, FIRST_CHUNK, None);
        while done < total {
            let upto = total.min(done + chunk);
            let keys = &asked.keys.keys(asked.tokens, wanted.size, upto, bare)[done..upto];
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
                if words > 0 && scan.change(wanted, &mut now, holders.as_slice(), number as u32) {
                    needed.retain(|bits| bits.iter().any(|bit| now[bit / 64] >> (bit % 64) & 1 == 1));
                }
                if alive.is_empty() && needed.is_empty() && !wanted.to_the_end {
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
    fn change(&mut self, wanted: &Wanted, now: &mut [u64], holders: &[SlotId], number: u32) -> bool {
        now.fill(0);
        let mut bit = 0;
        for holder in holders {
            while wanted.others.get(bit).is_some_and(|slot| slot < holder) {
                bit += 1;
            }
            if wanted.others.get(bit) == Some(holder) {
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
    pub fn stretches(&self) -> impl Iterator<Item = (u64, u64, &[u64])> {
        let ends = self.changes.iter().skip(1).map(|number| u64::from(*number)).chain([self.scanned as u64]);
        let starts = self.changes.iter().map(|number| u64::from(*number));
        starts.zip(ends).zip(self.bits.chunks(self.words.max(1))).map(|((start, end), bits)| (start, end, bits))
    }
}

/// Whether a bit of a stretch is set.
pub fn holds(bits: &[u64], bit: usize) -> bool {
    bits.get(bit / 64).is_some_and(|word| word >> (bit % 64) & 1 == 1)
}
