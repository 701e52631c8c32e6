//! The index of kv-cache-indexer at memory speed. See `README.md` beside `Cargo.toml` for who locks what.

pub mod blocks;
pub mod chains;
pub mod columns;
pub mod counters;
pub mod events;
pub mod groups;
pub mod holders;
pub mod index;
pub mod json;
pub mod keys;
pub mod ledger;
pub mod matching;
pub mod msgpack;
pub mod prompt;
#[cfg(feature = "python")]
mod python;
pub mod scan;
pub mod slots;
pub mod table;
pub mod waiting;
pub mod wire;
