//! The values of one event, gathered in whatever order they come before anything is known about the event.
//!
//! What cannot be used is remembered, not refused: it may turn out that the event needs no such field.

use super::reader::{self, Broken, Reader, Value};
use super::tokens;
use crate::events::EngineHash;

pub const MAX_HASHES: usize = 1_048_576;
pub const MAX_TOKENS: usize = 16_777_216;
pub const MAX_HASH_BYTES: usize = 64;

/// The fields that any dialect has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    Type,
    EventType,
    ParentBlockHash,
    ParentHash,
    BaseBlockIdx,
    BlockSize,
    LoraId,
    LoraName,
    Medium,
    GroupIdx,
    Kind,
    Window,
    CacheSalt,
    AdditionalSalt,
    ModelName,
    // from here on, those that are no scalars
    BlockHashes,
    SeqHashes,
    TokenIds,
    ExtraKeys,
}

const SCALARS: usize = Field::ModelName as usize + 1;

/// What follows the tag of an array, in order.
pub const STORED: [Field; 11] = [
    Field::BlockHashes,
    Field::ParentBlockHash,
    Field::TokenIds,
    Field::BlockSize,
    Field::LoraId,
    Field::Medium,
    Field::LoraName,
    Field::ExtraKeys,
    Field::GroupIdx,
    Field::Kind,
    Field::Window,
];
pub const REMOVED: [Field; 3] = [Field::BlockHashes, Field::Medium, Field::GroupIdx];

impl Field {
    pub const fn of(key: &[u8]) -> Option<Self> {
        Some(match key {
            b"type" => Self::Type,
            b"block_hashes" => Self::BlockHashes,
            b"parent_block_hash" => Self::ParentBlockHash,
            b"token_ids" => Self::TokenIds,
            b"block_size" => Self::BlockSize,
            b"lora_id" => Self::LoraId,
            b"medium" => Self::Medium,
            b"lora_name" => Self::LoraName,
            b"extra_keys" => Self::ExtraKeys,
            b"group_idx" => Self::GroupIdx,
            b"kv_cache_spec_kind" => Self::Kind,
            b"kv_cache_spec_sliding_window" => Self::Window,
            b"event_type" => Self::EventType,
            b"seq_hashes" => Self::SeqHashes,
            b"parent_hash" => Self::ParentHash,
            b"base_block_idx" => Self::BaseBlockIdx,
            b"cache_salt" => Self::CacheSalt,
            b"additional_salt" => Self::AdditionalSalt,
            b"model_name" => Self::ModelName,
            _ => return None,
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scalar<'a> {
    Absent,
    Nil,
    Uint(u64),
    Negative(i64),
    Text(&'a str),
    Bytes(&'a [u8]),
    /// Of a type that no field has.
    Other,
}

/// A list that was read at once.
#[derive(Default)]
pub enum List<T> {
    /// Nil, or not there.
    #[default]
    Nil,
    /// Why it cannot be used.
    Bad(&'static str),
    Read(Vec<T>),
}

/// Extra keys, which can be told apart only when the rest of the event is known.
#[derive(Clone, Copy)]
pub enum ExtraKeys<'a> {
    /// Nil, or not there.
    Nil,
    NotAList,
    /// A list of any length of which no item says anything.
    Blank,
    /// Well-formed items, one after the other.
    Items {
        count: usize,
        items: Reader<'a>,
    },
}

pub struct Fields<'a> {
    /// Only those in `seen` are of this event.
    scalars: [Scalar<'a>; SCALARS],
    /// A bit for each scalar.
    seen: u16,
    pub block_hashes: List<EngineHash>,
    pub seq_hashes: List<EngineHash>,
    pub token_ids: List<u32>,
    pub extra_keys: ExtraKeys<'a>,
}

impl<'a> Fields<'a> {
    pub const fn new() -> Self {
        Self {
            scalars: [Scalar::Absent; SCALARS],
            seen: 0,
            block_hashes: List::Nil,
            seq_hashes: List::Nil,
            token_ids: List::Nil,
            extra_keys: ExtraKeys::Nil,
        }
    }

    /// Makes room for the next event.
    pub fn clear(&mut self) {
        self.seen = 0;
        self.block_hashes = List::Nil;
        self.seq_hashes = List::Nil;
        self.token_ids = List::Nil;
        self.extra_keys = ExtraKeys::Nil;
    }

    pub fn get(&self, field: Field) -> Scalar<'a> {
        match self.scalars.get(field as usize) {
            Some(scalar) if self.seen & 1 << field as u16 != 0 => *scalar,
            _ => Scalar::Absent,
        }
    }

    /// Reads the value of a field. The last value counts.
    pub fn read(&mut self, field: Field, reader: &mut Reader<'a>) -> Result<(), Broken> {
        match field {
            Field::BlockHashes => self.block_hashes = read_hashes(reader)?,
            Field::SeqHashes => self.seq_hashes = read_hashes(reader)?,
            Field::TokenIds => self.token_ids = read_tokens(reader)?,
            Field::ExtraKeys => self.extra_keys = read_extra_keys(reader)?,
            _ => {
                let value = read_scalar(reader)?;
                if let Some(scalar) = self.scalars.get_mut(field as usize) {
                    *scalar = value;
                    self.seen |= 1 << field as u16;
                }
            }
        }
        Ok(())
    }

    /// Reads the keys and values of a map.
    pub fn read_map(&mut self, len: usize, reader: &mut Reader<'a>) -> Result<(), Broken> {
        for _ in 0..len {
            let key = reader.key()?;
            match key.and_then(Field::of) {
                Some(field) => self.read(field, reader)?,
                None => {
                    reader::text(key.unwrap_or_default())?;
                    reader.skip()?;
                }
            }
        }
        Ok(())
    }
}

fn read_scalar<'a>(reader: &mut Reader<'a>) -> Result<Scalar<'a>, Broken> {
    let value = reader.value()?;
    Ok(match value {
        Value::Nil => Scalar::Nil,
        Value::Uint(value) => Scalar::Uint(value),
        Value::Negative(value) => Scalar::Negative(value),
        Value::Text(text) => Scalar::Text(text),
        Value::Bytes(bytes) => Scalar::Bytes(bytes),
        _ => {
            reader.skip_inside(value)?;
            Scalar::Other
        }
    })
}

fn read_hashes(reader: &mut Reader) -> Result<List<EngineHash>, Broken> {
    let value = reader.value()?;
    let count = match value {
        Value::Nil => return Ok(List::Nil),
        Value::Array(count) if count <= MAX_HASHES => count,
        Value::Array(_) => {
            return reader.skip_inside(value).map(|()| List::Bad("too_many_hashes"));
        }
        _ => return reader.skip_inside(value).map(|()| List::Bad("bad_hashes")),
    };
    let mut hashes = Vec::with_capacity(count);
    for number in 1..=count {
        if let Some(hash) = reader.uint64() {
            hashes.push(EngineHash::from_int(hash));
        } else if let Some(hash) = hash(read_scalar(reader)?) {
            hashes.push(hash);
        } else {
            reader.skip_many(count - number)?;
            return Ok(List::Bad("bad_hash"));
        }
    }
    Ok(List::Read(hashes))
}

/// Some engines send the 64 bits of a hash with a sign.
pub fn hash(value: Scalar) -> Option<EngineHash> {
    match value {
        Scalar::Uint(value) => Some(EngineHash::from_int(value)),
        Scalar::Negative(value) => Some(EngineHash::from_int(value as u64)),
        Scalar::Bytes(bytes) if !bytes.is_empty() && bytes.len() <= MAX_HASH_BYTES => {
            Some(EngineHash::from_bytes(bytes))
        }
        _ => None,
    }
}

fn read_tokens(reader: &mut Reader) -> Result<List<u32>, Broken> {
    let value = reader.value()?;
    let count = match value {
        Value::Nil => return Ok(List::Nil),
        Value::Array(count) if count <= MAX_TOKENS => count,
        Value::Array(_) => {
            return reader.skip_inside(value).map(|()| List::Bad("too_many_tokens"));
        }
        _ => return reader.skip_inside(value).map(|()| List::Bad("bad_tokens")),
    };
    // EAGLE pages are over pairs [token, next token] (SGLang)
    let tokens = match reader.rest.first() {
        Some(0x90..=0x9f | 0xdc | 0xdd) if count > 0 => tokens::read_pairs(reader, count)?,
        _ => tokens::read(reader, count)?,
    };
    Ok(tokens.map_or(List::Bad("bad_tokens"), List::Read))
}

fn read_extra_keys<'a>(reader: &mut Reader<'a>) -> Result<ExtraKeys<'a>, Broken> {
    let count = match reader.value()? {
        Value::Nil => return Ok(ExtraKeys::Nil),
        Value::Array(count) => count,
        value => return reader.skip_inside(value).map(|()| ExtraKeys::NotAList),
    };
    let items = *reader;
    if let Some((nils, rest)) = items.rest.split_at_checked(count)
        && nils.iter().all(|tag| *tag == 0xc0)
    {
        reader.rest = rest;
        return Ok(ExtraKeys::Blank);
    }
    let mut blank = true;
    for _ in 0..count {
        let value = reader.value()?;
        blank = blank && !is_true(value);
        reader.skip_inside(value)?;
    }
    Ok(if blank { ExtraKeys::Blank } else { ExtraKeys::Items { count, items } })
}

/// As Python has it.
fn is_true(value: Value) -> bool {
    match value {
        Value::Nil | Value::False => false,
        Value::Uint(value) => value != 0,
        Value::Float(value) => value != 0.0,
        Value::Text(text) => !text.is_empty(),
        Value::Bytes(bytes) => !bytes.is_empty(),
        Value::Array(len) | Value::Map(len) => len > 0,
        Value::True | Value::Negative(_) | Value::Timestamp | Value::Ext => true,
    }
}
