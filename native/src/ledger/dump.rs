//! A ledger as bytes, and back: what `indexer/sections.py` does.

use std::time::{Duration, Instant};

use super::slot::{Seen, digest_key};
use super::{Ledger, Limits, Slot, Tier};
use crate::blocks::Step;
use crate::columns::{Flaw, Reader, Writer};
use crate::events::{EngineHash, Lora, Stored};
use crate::groups::GroupSpec;
use crate::ledger::Here;
use crate::table::Map;
use crate::waiting::{ParkedEvent, Place};
use std::collections::HashSet;
use std::sync::Arc;

/// The number whose product with an odd one is 1, modulo 2^64.
fn inverse_of(odd: u64) -> u64 {
    // Newton's iteration: each step doubles the low bits that are right, and 3 are from the start
    (0..5).fold(odd, |guess, _| guess.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(guess))))
}

impl Ledger {
    /// Writes all of it; nothing is due.
    pub fn write(&self, out: &mut Writer, secret: u64) {
        debug_assert!(self.due.is_empty());
        out.flag(self.conflicts);
        out.u8(self.evicted.map_or(0, |tier| tier as u8 + 1));
        out.count(self.groups.len());
        for (number, spec) in &self.groups {
            out.u32(*number);
            out.u32(spec.block_size);
            out.u64(spec.tail.unwrap_or(0));
        }
        out.count(self.slots.len());
        for slot in &self.slots {
            slot.write(out, inverse_of(secret));
        }
        let remembered: Vec<_> =
            self.remembered.order.iter().map(|name| (*name, self.remembered.known[name])).collect();
        out.count(remembered.len());
        for (name, (key, size)) in remembered {
            out.name(name);
            out.u64(key);
            out.u32(size);
        }
        out.u64(self.waiting.dropped);
        let parked = self.waiting.parked();
        out.count(parked.len());
        for event in parked {
            write_parked(event, out);
        }
        let unplaced = self.waiting.unplaced();
        out.count(unplaced.len());
        for (name, place, size) in unplaced {
            out.name(name);
            out.text(&place.medium);
            out.group(place.group);
            out.u32(size);
        }
    }

    /// Reads into a new ledger; `age` seconds passed since it was written. Holds nothing in the table of blocks until
    /// `enter`.
    pub fn read(&mut self, from: &mut Reader, limits: &Limits, secret: u64, age: f64) -> Result<(), Flaw> {
        self.conflicts = from.flag()?;
        self.evicted = match from.u8()? {
            0 => None,
            tier => match Tier::ALL.get(usize::from(tier) - 1) {
                Some(tier) => Some(*tier),
                None => return from.flaw("no tier"),
            },
        };
        for _ in 0..from.count(16)? {
            let (number, block_size, tail) = (from.u32()?, from.size()?, from.u64()?);
            if self.groups.iter().any(|(known, _)| *known == number) {
                return from.flaw("a cache group is there twice");
            }
            self.groups.push((number, GroupSpec { block_size, tail: (tail > 0).then_some(tail) }));
        }
        let slots = from.count(1)?;
        if slots > limits.max_slots_per_source {
            return from.flaw(&format!("{slots} slots, more than Limits.max_slots_per_source"));
        }
        let mut places = HashSet::new();
        for _ in 0..slots {
            let slot = Slot::read(from, secret, age)?;
            if !places.insert((slot.medium.clone(), slot.group, slot.block_size)) {
                return from.flaw("a slot is there twice");
            }
            self.slots.push(slot);
        }
        for _ in 0..from.count(28)? {
            let (name, key, size) = (from.name()?, from.u64()?, from.size()?);
            self.remembered.keep(name, (key, size), limits.remembered_blocks);
        }
        let dropped = from.u64()?;
        for _ in 0..from.count(1)? {
            let parked = read_parked(from)?;
            let Some(parent) = parked.event.parent else { return from.flaw("an event waits for no parent") };
            self.waiting.put_back(&parked, parent);
        }
        for _ in 0..from.count(1)? {
            let (name, medium, group, size) = (from.name()?, from.text()?, from.group()?, from.u32()?);
            self.waiting.wait(name, &Place { medium: medium.into(), group }, size, true);
        }
        self.waiting.dropped = self.waiting.dropped.saturating_add(dropped);
        from.end()
    }

    /// Takes a number for each slot and enters its blocks in the table; gives back what it took where there are too few.
    pub fn enter(&mut self, at: &Here) -> Result<(), Flaw> {
        let ids: Vec<_> = self.slots.iter().map_while(|_| at.slots.take()).collect();
        if ids.len() < self.slots.len() {
            ids.into_iter().for_each(|id| at.slots.give_back(id));
            return Err("more slots than an index can have".into());
        }
        for (slot, id) in self.slots.iter_mut().zip(ids) {
            slot.id = id;
            let mut keys = slot.held.keys().peekable();
            while keys.peek().is_some() {
                let some: Vec<Step> = keys.by_ref().take(4096).map(|key| Step { key, holds: true }).collect();
                at.blocks.take(id, &some, &mut slot.aliases, &crossbeam_epoch::pin());
            }
        }
        Ok(())
    }
}

impl Slot {
    fn write(&self, out: &mut Writer, inverse: u64) {
        out.text(&self.medium);
        out.group(self.group);
        out.u32(self.block_size);
        out.bytes.reserve(16 * self.held.ints.len() + 24 * self.held.digests.len());
        out.count(self.held.ints.len());
        self.held.ints.iter().for_each(|([name], _)| out.u64(name.wrapping_mul(inverse)));
        self.held.ints.iter().for_each(|(_, key)| out.u64(key));
        out.count(self.held.digests.len());
        for ([low, high], _) in self.held.digests.iter() {
            out.u64(low.wrapping_mul(inverse));
            out.u64(high);
        }
        self.held.digests.iter().for_each(|(_, key)| out.u64(key));
        out.count(self.copies.len());
        for (name, copies) in &self.copies {
            out.name(*name);
            out.u64(*copies);
        }
        out.flag(self.seen.is_some());
        if let Some(seen) = &self.seen {
            let now = Instant::now();
            let newest = |(time, name): &&(Instant, EngineHash)| seen.last.get(name) == Some(time);
            let mut order: Vec<_> = seen.order.iter().rev().filter(newest).collect();
            let mut met = HashSet::new();
            order.retain(|(_, name)| met.insert(*name)); // a name may be there twice at one time
            out.count(order.len());
            for (time, name) in order.into_iter().rev() {
                out.name(*name);
                out.f64(now.saturating_duration_since(*time).as_secs_f64());
            }
        }
    }

    fn read(from: &mut Reader, secret: u64, age: f64) -> Result<Self, Flaw> {
        let (medium, group, block_size): (Arc<str>, _, _) = (from.text()?.into(), from.group()?, from.size()?);
        let mut slot = Self { seen: None, ..Self::new(0, medium, group, block_size) };
        let ints = from.count(16)?;
        let (names, keys) = (from.words(ints)?, from.words(ints)?);
        let rows = names.zip(keys).map(|(name, key)| ([name.wrapping_mul(secret)], key));
        let mut is_whole = fill(&mut slot.held.ints, ints, rows);
        let digests = from.count(24)?;
        let (mut words, keys) = (from.words(2 * digests)?, from.words(digests)?);
        let mut rows = Vec::with_capacity(digests);
        for key in keys {
            let (low, high) = (words.next().unwrap_or(0), words.next().unwrap_or(0));
            let name = EngineHash(u128::from(high) << 64 | u128::from(low));
            is_whole &= name.as_int().is_none();
            rows.push((digest_key(name, secret), key));
        }
        is_whole &= fill(&mut slot.held.digests, digests, rows.into_iter());
        if !is_whole {
            return from.flaw("a block is named twice, or by what is no name");
        }
        for _ in 0..from.count(24)? {
            let (name, copies) = (from.name()?, from.u64()?);
            if copies < 2 {
                return from.flaw("less than two copies");
            }
            slot.copies.insert(name, copies);
        }
        if from.flag()? {
            let (mut seen, now) = (Seen::default(), Instant::now());
            for _ in 0..from.count(24)? {
                let (name, before) = (from.name()?, from.f64()? + age);
                let ago = Duration::try_from_secs_f64(before).unwrap_or_default();
                seen.announce(name, now.checked_sub(ago).unwrap_or(now));
            }
            slot.seen = Some(seen);
        }
        Ok(slot)
    }
}

/// Says no where a name is there twice.
fn fill<const W: usize>(map: &mut Map<W>, rows: usize, all: impl Iterator<Item = ([u64; W], u64)>) -> bool {
    map.reserve(rows);
    let mut is_new = true;
    for (name, key) in all {
        is_new &= map.insert_or_get(name, key.max(1)) == 0;
    }
    is_new
}

fn write_parked(parked: &ParkedEvent, out: &mut Writer) {
    let event = &parked.event;
    out.names(&event.block_hashes);
    out.name(event.parent.unwrap_or(EngineHash::from_int(0)));
    out.count(event.token_ids.len());
    event.token_ids.iter().for_each(|token| out.u32(*token));
    out.u32(event.block_size);
    out.text(&event.medium);
    out.group(event.group);
    out.maybe(event.kind.as_deref());
    out.group(event.sliding_window);
    match &event.lora {
        None => out.u8(0),
        Some(Lora::Name(name)) => {
            out.u8(1);
            out.text(name);
        }
        Some(Lora::Number(number)) => {
            out.u8(2);
            out.i128(*number);
        }
    }
    out.maybe(event.cache_salt.as_deref());
    out.flag(event.extras.is_some());
    if let Some(extras) = &event.extras {
        out.count(extras.len());
        extras.iter().for_each(|extra| out.blob(extra));
    }
    out.flag(event.bare_images);
    out.maybe(event.model.as_deref());
    out.names(&parked.removed);
}

fn read_parked(from: &mut Reader) -> Result<ParkedEvent, Flaw> {
    let (block_hashes, parent) = (from.names()?, Some(from.name()?));
    let tokens = from.count(4)?;
    let tokens = from.take(4 * tokens)?.chunks_exact(4);
    let token_ids = tokens.map(|token| u32::from_le_bytes(token.try_into().expect("4 of them"))).collect();
    let (block_size, medium, group) = (from.size()?, from.text()?.into(), from.group()?);
    let (kind, sliding_window) = (from.maybe()?.map(Into::into), from.group()?);
    let lora = match from.u8()? {
        0 => None,
        1 => Some(Lora::Name(from.text()?.into())),
        2 => Some(Lora::Number(from.i128()?)),
        _ => return from.flaw("no adapter"),
    };
    let cache_salt = from.maybe()?.map(Into::into);
    let extras = if from.flag()? {
        let count = from.count(8)?;
        Some((0..count).map(|_| from.blob().map(<[u8]>::to_vec)).collect::<Result<_, _>>()?)
    } else {
        None
    };
    let (bare_images, model) = (from.flag()?, from.maybe()?.map(Into::into));
    let event = Stored {
        block_hashes,
        parent,
        token_ids,
        block_size,
        medium,
        group,
        kind,
        sliding_window,
        lora,
        cache_salt,
        extras,
        bare_images,
        model,
    };
    Ok(ParkedEvent { event, removed: from.names()? })
}
