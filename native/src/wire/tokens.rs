//! Lists of token ids, the bulk of every payload.
//!
//! The ids of one list differ in width in no pattern that a branch predictor could learn, and how wide one is must be
//! known before the next is found. So the widths are worked out ahead, for every byte of a window as if an id began
//! there, many bytes at a time; following them is then one load and one addition for every two ids.

use std::cell::RefCell;

use super::reader::{Broken, Reader, Value};

/// Bytes of a list that are looked at together.
const WINDOW: usize = 512;
/// Bytes that are worked on at once.
const LANES: usize = 16;
/// Room before the window, so that the four bytes that end with an id can be read wherever it ends.
const BEFORE: usize = 4;
/// Bytes behind the window that count: what begins in it may end there.
const BEHIND: usize = 2 * LANES;
/// Room behind the window: no step is longer.
const ROOM: usize = 256;
/// Set in the width of what is no id, or an id as hardly any encoder writes it.
const ODD: u8 = 0x80;
/// How many ids are read one by one where a window holds something odd.
const SLOWLY: usize = 128;
/// Shorter lists are read one by one.
const SHORT: usize = 6;

/// By width: the part of an id's last four bytes that is its value.
const MASKS: [u32; 8] = [0, 0xff, 0xff, 0xffff, 0, u32::MAX, 0, 0];

thread_local! {
    // kept, because filling it with zeros would take longer than reading a short list
    static SHARED: RefCell<Window> = const { RefCell::new(Window::new()) };
}

/// Reads the next `count` values. None if one of them is no id.
pub fn read(reader: &mut Reader, count: usize) -> Result<Option<Vec<u32>>, Broken> {
    let mut ids = vec![0; count];
    let mut left = ids.as_mut_slice();
    while left.len() >= SHORT {
        let mut done = SHARED.with_borrow_mut(|window| window.read(reader, left));
        if done == 0 {
            done = SLOWLY.min(left.len());
            if !read_slowly(reader, left, done)? {
                return Ok(None);
            }
        }
        left = left.get_mut(done..).unwrap_or_default();
    }
    let done = left.len();
    Ok(read_slowly(reader, left, done)?.then_some(ids))
}

/// Reads the next `count` values, each a pair of an id and something else, and keeps the ids. None if one is not so.
pub fn read_pairs(reader: &mut Reader, count: usize) -> Result<Option<Vec<u32>>, Broken> {
    let mut ids = Vec::with_capacity(count);
    for number in 1..=count {
        let value = reader.value()?;
        let id = if value == Value::Array(2) {
            let id = read_one(reader)?;
            reader.skip_many(1)?;
            id
        } else {
            reader.skip_inside(value)?;
            None
        };
        let Some(id) = id else {
            reader.skip_many(count - number)?;
            return Ok(None);
        };
        ids.push(id);
    }
    Ok(Some(ids))
}

/// Fills the first `count` of `ids`. False if one is no id; all of `ids` are then read over.
fn read_slowly(reader: &mut Reader, ids: &mut [u32], count: usize) -> Result<bool, Broken> {
    let behind = ids.len();
    for (number, id) in ids.iter_mut().take(count).enumerate() {
        let Some(value) = read_one(reader)? else {
            reader.skip_many(behind - number - 1)?;
            return Ok(false);
        };
        *id = value;
    }
    Ok(true)
}

/// Reads any value. Booleans count as 0 and 1, as Python's arrays have it.
fn read_one(reader: &mut Reader) -> Result<Option<u32>, Broken> {
    match reader.value()? {
        Value::Uint(value) => Ok(u32::try_from(value).ok()),
        Value::False => Ok(Some(0)),
        Value::True => Ok(Some(1)),
        other => reader.skip_inside(other).map(|()| None),
    }
}

struct Window {
    raw: [u8; BEFORE + WINDOW + ROOM],
    /// How many bytes an id takes that begins at this byte.
    widths: [u8; WINDOW + LANES],
    /// How many bytes it takes together with the next.
    steps: [u8; WINDOW],
}

impl Window {
    const fn new() -> Self {
        Self { raw: [0; BEFORE + WINDOW + ROOM], widths: [0; WINDOW + LANES], steps: [0; WINDOW] }
    }

    /// Reads as many ids as begin in the window, two at a time. None are read if something else is among them.
    fn read(&mut self, reader: &mut Reader, ids: &mut [u32]) -> usize {
        // no id is longer than five bytes
        let limit = WINDOW.min(ids.len().saturating_mul(5).next_multiple_of(LANES));
        self.look(reader.rest, limit);
        let (mut at, mut seen, mut done) = (0, 0, 0);
        for [first, second] in ids.as_chunks_mut().0 {
            if at >= limit {
                break;
            }
            let (width, step) = (self.widths[at], self.steps[at]);
            seen |= step;
            *first = self.ending(at + usize::from(width & 7), width);
            at += usize::from(step);
            *second = self.ending(at, step.wrapping_sub(width));
            done += 2;
        }
        match reader.rest.get(at..) {
            Some(rest) if seen & ODD == 0 => {
                reader.rest = rest;
                done
            }
            _ => 0,
        }
    }

    /// Works out the widths of what may begin in the first `limit` bytes.
    fn look(&mut self, bytes: &[u8], limit: usize) {
        let len = bytes.len().min(limit + BEHIND);
        let raw = &mut self.raw[BEFORE..];
        raw[..len].copy_from_slice(&bytes[..len]);
        raw[len..limit + BEHIND].fill(0);
        let raw = raw.as_chunks().0;
        let widths = self.widths[..limit + LANES].as_chunks_mut().0;
        for (widths, raw) in widths.iter_mut().zip(raw) {
            *widths = widths_of(raw);
        }
        let steps = self.steps[..limit].as_chunks_mut().0;
        for (number, steps) in steps.iter_mut().enumerate() {
            *steps = steps_of(lanes(&self.widths, number * LANES));
        }
    }

    fn ending(&self, end: usize, width: u8) -> u32 {
        // the four bytes up to `end`, in a row with `BEFORE` more bytes in front
        let bytes = lanes(&self.raw, end);
        u32::from_be_bytes(*bytes) & MASKS[usize::from(width & 7)]
    }
}

/// One for 0x00 to 0x7f, 2 for 0xcc, 3 for 0xcd, 5 for 0xce, `ODD` and more for all others.
// An index and plain arithmetic, here and below: the compiler makes vector instructions of that.
#[inline(always)]
fn widths_of(tags: &[u8; LANES]) -> [u8; LANES] {
    let mut widths = [0; LANES];
    for i in 0..LANES {
        let above = tags[i].saturating_sub(0xcb);
        let between = tags[i] & mask(above == 0);
        let odd = (above.wrapping_add(ODD - 4) | between) & ODD;
        widths[i] = (above + 1 + u8::from(above == 3)) | odd;
    }
    widths
}

/// Each width and the width that is found behind it.
#[inline(always)]
fn steps_of(widths: &[u8; 2 * LANES]) -> [u8; LANES] {
    let own: &[u8; LANES] = lanes(widths, 0);
    let one: &[u8; LANES] = lanes(widths, 1);
    let two: &[u8; LANES] = lanes(widths, 2);
    let three: &[u8; LANES] = lanes(widths, 3);
    let five: &[u8; LANES] = lanes(widths, 5);
    let mut steps = [0; LANES];
    for i in 0..LANES {
        let behind = (one[i] & mask(own[i] == 1))
            | (two[i] & mask(own[i] == 2))
            | (three[i] & mask(own[i] == 3))
            | (five[i] & mask(own[i] == 5));
        steps[i] = own[i].wrapping_add(behind);
    }
    steps
}

fn mask(condition: bool) -> u8 {
    if condition { u8::MAX } else { 0 }
}

#[inline(always)]
fn lanes<const N: usize>(bytes: &[u8], at: usize) -> &[u8; N] {
    bytes[at..].first_chunk().expect("N bytes follow")
}
