//! What happens in the cache of one source, in one form for all dialects: the twin of `indexer/events.py`.

use std::sync::Arc;

/// An engine's own name of a block. Integers keep their 64 bits; byte digests of any length become 127 bits of XXH3
/// with the top bit set, so that the two kinds never meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EngineHash(pub u128);

const DIGEST: u128 = 1 << 127;

impl EngineHash {
    pub const fn from_int(value: u64) -> Self {
        Self(value as u128)
    }

    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self(xxhash_rust::xxh3::xxh3_128(bytes) | DIGEST)
    }

    /// The integer, where the engine named the block by one.
    pub const fn as_int(self) -> Option<u64> {
        if self.0 & DIGEST == 0 { Some(self.0 as u64) } else { None }
    }
}

/// An adapter: its name, or its number where an old engine sends no name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Lora {
    Name(Arc<str>),
    Number(i128),
}

/// Blocks entered the cache.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    pub block_hashes: Vec<EngineHash>,
    pub parent: Option<EngineHash>,
    pub token_ids: Vec<u32>,
    pub block_size: u32,
    /// Lower-case.
    pub medium: Arc<str>,
    pub group: Option<u32>,
    pub kind: Option<Box<str>>,
    pub sliding_window: Option<u32>,
    pub lora: Option<Lora>,
    pub cache_salt: Option<Box<str>>,
    /// One entry for each hash.
    pub extras: Option<Vec<Vec<u8>>>,
    pub bare_images: bool,
    pub model: Option<Box<str>>,
}

/// One copy of each named block left the cache.
#[derive(Clone, Debug, PartialEq)]
pub struct Removed {
    pub block_hashes: Vec<EngineHash>,
    /// Lower-case.
    pub medium: Arc<str>,
    pub group: Option<u32>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Stored(Stored),
    Removed(Removed),
    Cleared,
}

/// What one message carries.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Seconds since the epoch.
    pub ts: f64,
    pub rank: Option<u32>,
    pub events: Vec<Event>,
    /// How many events were dropped or ignored, by reason, in the order in which the reasons first came up.
    pub discards: Vec<(&'static str, u64)>,
}

impl Batch {
    /// Whether one of the events empties the cache.
    pub fn clears(&self) -> bool {
        self.events.contains(&Event::Cleared)
    }
}
