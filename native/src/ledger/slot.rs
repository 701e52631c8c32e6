//! The blocks of one source on one medium: by which names its engine knows them, and when it last said so.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use hashbrown::HashMap;

use crate::events::EngineHash;
use crate::holders::SlotId;
use crate::table::Map;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    Gpu,
    Cpu,
    Disk,
    Shared,
}

impl Tier {
    /// From the most to the least useful.
    pub const ALL: [Self; 4] = [Self::Gpu, Self::Cpu, Self::Disk, Self::Shared];

    /// Words that are not known count as shared.
    pub fn of(medium: &str) -> Self {
        match medium {
            "gpu" => Self::Gpu,
            "cpu" | "cpu_pinned" => Self::Cpu,
            "disk" => Self::Disk,
            _ => Self::Shared,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Gpu => "gpu",
            Self::Cpu => "cpu",
            Self::Disk => "disk",
            Self::Shared => "shared",
        }
    }
}

/// Engine hash → block key.
#[derive(Default)]
pub(super) struct Held {
    pub(super) ints: Map<1>,
    pub(super) digests: Map<2>,
}

impl Held {
    fn len(&self) -> usize {
        self.ints.len() + self.digests.len()
    }

    #[inline]
    pub(super) fn get(&self, name: EngineHash, secret: u64) -> u64 {
        match name.as_int() {
            Some(int) => self.ints.get([int.wrapping_mul(secret)]),
            None => self.digests.get(digest_key(name, secret)),
        }
    }

    #[inline]
    pub(super) fn prefetch(&self, name: EngineHash, secret: u64) {
        match name.as_int() {
            Some(int) => self.ints.prefetch(&[int.wrapping_mul(secret)]),
            None => self.digests.prefetch(&digest_key(name, secret)),
        }
    }

    #[inline]
    pub(super) fn insert_or_get(&mut self, name: EngineHash, key: u64, secret: u64) -> u64 {
        let key = key.max(1); // 0 marks a gap; a key that is 0 is either forged or the first in the world
        match name.as_int() {
            Some(int) => self.ints.insert_or_get([int.wrapping_mul(secret)], key),
            None => self.digests.insert_or_get(digest_key(name, secret), key),
        }
    }

    pub(super) fn remove(&mut self, name: EngineHash, secret: u64) -> u64 {
        match name.as_int() {
            Some(int) => self.ints.remove([int.wrapping_mul(secret)]),
            None => self.digests.remove(digest_key(name, secret)),
        }
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = u64> + '_ {
        self.ints.iter().map(|(_, key)| key).chain(self.digests.iter().map(|(_, key)| key))
    }
}

/// Multiplying by a secret odd number spreads names that an engine counts up, and nobody can choose which rows they crowd.
pub(super) fn digest_key(name: EngineHash, secret: u64) -> [u64; 2] {
    [(name.0 as u64).wrapping_mul(secret), (name.0 >> 64) as u64]
}

/// When each block of a medium was last announced.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) last: HashMap<EngineHash, Instant>,
    /// In order of time; entries that `last` contradicts are of no meaning.
    pub(super) order: VecDeque<(Instant, EngineHash)>,
}

impl Seen {
    pub(super) fn announce(&mut self, name: EngineHash, now: Instant) {
        self.last.insert(name, now);
        self.order.push_back((now, name));
        if self.order.len() > 2 * self.last.len() + 64 {
            let last = &self.last;
            self.order.retain(|(time, name)| last.get(name) == Some(time));
        }
    }

    pub(super) fn pop_before(&mut self, before: Instant) -> Option<EngineHash> {
        while let Some((time, name)) = self.order.front().copied() {
            let newest = self.last.get(&name) == Some(&time);
            if newest && time >= before {
                return None;
            }
            self.order.pop_front();
            if newest {
                self.last.remove(&name);
                return Some(name);
            }
        }
        None
    }
}

/// The blocks of one source on one medium, of one cache group and one block size.
pub struct Slot {
    pub id: SlotId,
    pub medium: Arc<str>,
    pub tier: Tier,
    pub group: Option<u32>,
    pub block_size: u32,
    pub(super) held: Held,
    /// Physical copies, for the few hashes that have more than one.
    pub(super) copies: HashMap<EngineHash, u64>,
    /// How many more hashes stand for a key, for the few keys that have more than one.
    pub(super) aliases: HashMap<u64, u64>,
    /// As long as the engine has announced no removal here.
    pub(super) seen: Option<Seen>,
}

impl Slot {
    /// One that holds nothing yet.
    pub(super) fn new(id: SlotId, medium: Arc<str>, group: Option<u32>, block_size: u32) -> Self {
        let tier = Tier::of(&medium);
        let (held, copies, aliases) = Default::default();
        let seen = (tier != Tier::Gpu).then(Seen::default);
        Self { id, medium, tier, group, block_size, held, copies, aliases, seen }
    }

    /// Blocks held.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// The keys of all blocks held, once for each hash.
    pub fn keys(&self) -> impl Iterator<Item = u64> + '_ {
        self.held.keys()
    }

    pub(super) fn bytes(&self) -> usize {
        let seen = self.seen.as_ref().map_or(0, |seen| seen.last.capacity() * 40 + seen.order.capacity() * 32);
        size_of::<Self>()
            + self.held.ints.bytes()
            + self.held.digests.bytes()
            + self.copies.capacity() * 33
            + self.aliases.capacity() * 17
            + seen
    }
}
