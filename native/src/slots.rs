//! The numbers of slots, and whether what readers know of the slots is still so.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::holders::{MAX_SLOTS, SlotId};

#[derive(Default)]
struct Numbers {
    free: Vec<SlotId>,
    next: SlotId,
}

/// All slots of an index.
#[derive(Default)]
pub struct Slots {
    numbers: Mutex<Numbers>,
    layout: AtomicU64,
    reused: AtomicU64,
}

impl Slots {
    /// Gives a number to a new slot, None where all are in use.
    pub fn take(&self) -> Option<SlotId> {
        let mut numbers = self.numbers.lock();
        numbers.free.pop().or_else(|| {
            let number = numbers.next;
            numbers.next = (number + 1).min(MAX_SLOTS);
            (number < MAX_SLOTS).then_some(number)
        })
    }

    /// Takes back the number of a slot that holds nothing any more.
    pub fn give_back(&self, slot: SlotId) {
        self.reused.fetch_add(1, Ordering::SeqCst);
        self.numbers.lock().free.push(slot);
    }

    /// How many numbers were given back: where that changed, an answer may have taken one slot for another.
    pub fn given_back(&self) -> u64 {
        self.reused.load(Ordering::SeqCst)
    }

    /// Says that some source has other slots or cache groups than before.
    pub fn change_layout(&self) {
        self.layout.fetch_add(1, Ordering::SeqCst);
    }

    /// Changes whenever some source has other slots or cache groups than before.
    pub fn layout(&self) -> u64 {
        self.layout.load(Ordering::SeqCst)
    }
}
