//! What happened, counted, under the names that `indexer/tracking.py` has.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($name:ident),* $(,)?) => {
        /// What happened, by name.
        #[derive(Default)]
        pub struct Counters { $(pub $name: AtomicU64),* }

        impl Counters {
            /// All names and values.
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((concat!(stringify!($name), "_total"), self.$name.load(Ordering::Relaxed))),*]
            }
        }
    };
}

counters! {
    stored, removed, cleared, restarts, copies, hash_conflicts, parked, unplaced, partial_blocks, removed_unknown,
    expired, evicted, recounted, too_many_slots,
}

/// Adds to a counter.
pub fn count(counter: &AtomicU64, more: usize) {
    if more > 0 {
        counter.fetch_add(more as u64, Ordering::Relaxed);
    }
}
