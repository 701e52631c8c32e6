//! The index of kv-cache-indexer at memory speed. See `README.md` beside `Cargo.toml` for who locks what.

pub mod events;
pub mod msgpack;
#[cfg(feature = "python")]
mod python;
