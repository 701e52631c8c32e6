//! The event decoder: every dialect, every kind of bad input, and a great many payloads that nobody would send.
//!
//! `KVINDEX_FUZZ` sets how many of the last kind, and with which seed where `KVINDEX_FUZZ_SEED` is set too.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::Path;
use std::{env, fs, iter, thread};

use kvindex_native::events::{Batch, EngineHash, Event, Lora, Removed, Stored};
use kvindex_native::msgpack;
use kvindex_native::wire::{
    DecodeError, MAX_BLOCK_SIZE, MAX_DEPTH, MAX_EVENTS, MAX_GROUP, MAX_HASH_BYTES, MAX_HASHES, MAX_LORA, MAX_RANK,
    MAX_TEXT, MAX_TOKENS, MAX_WINDOW, decode_batch,
};

// ---- what one decode takes of memory

struct Counting;

thread_local! {
    static USED: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: the system's allocator does all the work. The counters need no memory and have no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let used = USED.get().wrapping_add(layout.size());
        USED.set(used);
        // below zero if more was given back here than taken, of what other threads took
        if used < usize::MAX / 2 {
            PEAK.set(PEAK.get().max(used));
        }
        // SAFETY: as the caller has it.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        USED.set(USED.get().wrapping_sub(layout.size()));
        // SAFETY: as the caller has it.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Room for the first events and the texts of errors.
const MEMORY: usize = 24 << 10;
/// Bytes for each byte of payload. A removal of nothing takes 15 on the wire and 208 decoded, twice that and half again
/// while the list of events grows; a hash takes 1 to 9 on the wire and 16 decoded.
const MEMORY_PER_BYTE: usize = 48;

/// Decodes, and checks what holds for all payloads.
fn decode(payload: &[u8]) -> Result<Batch, DecodeError> {
    USED.set(0);
    PEAK.set(0);
    let result = decode_batch(payload);
    let peak = PEAK.get();
    let most = MEMORY + MEMORY_PER_BYTE * payload.len();
    assert!(peak <= most, "{peak} bytes at once for {} of payload: {}", payload.len(), hex(payload));
    match &result {
        Ok(batch) => assert!(is_sound(batch, payload.len()), "{batch:?} from {}", hex(payload)),
        Err(error) => assert!(ERRORS.contains(&error.reason), "{error} from {}", hex(payload)),
    }
    result
}

const ERRORS: [&str; 4] = ["bad_msgpack", "bad_batch", "bad_rank", "too_many_events"];
const DISCARDS: [&str; 15] = [
    "bad_block_size",
    "bad_event",
    "bad_extra_keys",
    "bad_group",
    "bad_hash",
    "bad_hashes",
    "bad_lora",
    "bad_msgpack",
    "bad_text",
    "bad_tokens",
    "bad_window",
    "too_few_tokens",
    "too_many_hashes",
    "too_many_tokens",
    "unknown_event",
];

fn is_sound(batch: &Batch, len: usize) -> bool {
    let discards: u64 = batch.discards.iter().map(|(_, count)| count).sum();
    batch.rank.is_none_or(|rank| rank <= MAX_RANK)
        && batch.events.len() + discards as usize <= MAX_EVENTS.min(len)
        && batch.discards.iter().all(|(reason, count)| DISCARDS.contains(reason) && *count > 0)
        && batch.events.iter().all(|event| match event {
            Event::Stored(stored) => is_sound_store(stored, len),
            Event::Removed(removed) => removed.block_hashes.len() <= MAX_HASHES.min(len) && is_medium(&removed.medium),
            Event::Cleared => true,
        })
}

fn is_sound_store(stored: &Stored, len: usize) -> bool {
    let (blocks, tokens) = (stored.block_hashes.len(), stored.token_ids.len());
    let enough = tokens == 0 || stored.block_size > 0 && blocks <= tokens.div_ceil(stored.block_size as usize);
    let is_text =
        |text: &Option<Box<str>>| text.as_ref().is_none_or(|text| !text.is_empty() && text.chars().count() <= MAX_TEXT);
    blocks <= MAX_HASHES.min(len)
        && tokens <= MAX_TOKENS.min(len)
        && enough
        && stored.block_size <= MAX_BLOCK_SIZE
        && stored.group.is_none_or(|group| group <= MAX_GROUP)
        && stored.sliding_window.is_none_or(|window| window <= MAX_WINDOW)
        && stored.extras.as_ref().is_none_or(|extras| extras.len() == blocks && tokens > 0)
        && (stored.cache_salt.is_none() || stored.parent.is_none())
        && is_medium(&stored.medium)
        && is_text(&stored.kind)
        && is_text(&stored.model)
}

fn is_medium(medium: &str) -> bool {
    !medium.is_empty() && medium == medium.to_lowercase()
}

// ---- payloads

/// What payloads are made of.
#[derive(Clone, Debug)]
enum Item {
    Nil,
    Int(i128),
    Float(f64),
    Text(String),
    Bytes(Vec<u8>),
    List(Vec<Item>),
    Map(Vec<(Item, Item)>),
    /// Bytes as they are.
    Raw(Vec<u8>),
}

use Item::Nil;

const TRUE: [u8; 1] = [0xc3];

impl Item {
    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Nil => msgpack::write_nil(out),
            Self::Int(value) => msgpack::write_int(out, *value),
            Self::Float(value) => {
                out.push(0xcb);
                out.extend(value.to_be_bytes());
            }
            Self::Text(text) => msgpack::write_str(out, text),
            Self::Bytes(bytes) => msgpack::write_bin(out, bytes),
            Self::List(items) => {
                msgpack::write_array_len(out, items.len());
                items.iter().for_each(|item| item.write(out));
            }
            Self::Map(items) => {
                out.push(0xde);
                out.extend((items.len() as u16).to_be_bytes());
                for (key, value) in items {
                    key.write(out);
                    value.write(out);
                }
            }
            Self::Raw(bytes) => out.extend(bytes),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.write(&mut out);
        out
    }
}

macro_rules! item_from {
    ($($from:ty => |$value:ident| $to:expr;)*) => {
        $(impl From<$from> for Item {
            fn from($value: $from) -> Self {
                $to
            }
        })*
    };
}

item_from! {
    i32 => |value| Self::Int(value.into());
    u32 => |value| Self::Int(value.into());
    i64 => |value| Self::Int(value.into());
    u64 => |value| Self::Int(value.into());
    f64 => |value| Self::Float(value);
    &str => |text| Self::Text(text.into());
    String => |text| Self::Text(text);
    Vec<u8> => |bytes| Self::Bytes(bytes);
    [u8; 1] => |bytes| Self::Raw(bytes.into());
    Vec<Item> => |items| Self::List(items);
}

macro_rules! list {
    ($($item:expr),* $(,)?) => { Item::List(vec![$(Item::from($item)),*]) };
}

macro_rules! map {
    ($($key:expr => $value:expr),* $(,)?) => { Item::Map(vec![$((Item::from($key), Item::from($value))),*]) };
}

fn ints(values: impl IntoIterator<Item = i64>) -> Item {
    Item::List(values.into_iter().map(Item::from).collect())
}

fn batch_of(events: Vec<Item>) -> Vec<u8> {
    list![1.5, events, 0].bytes()
}

/// The event of a batch of one.
fn event_of(event: Item) -> Event {
    let batch = decode(&batch_of(vec![event])).expect("a batch");
    assert_eq!(batch.discards, []);
    batch.events.into_iter().next().expect("an event")
}

fn stored_of(event: Item) -> Stored {
    match event_of(event) {
        Event::Stored(stored) => stored,
        other => panic!("expected a store, got {other:?}"),
    }
}

fn plain_store() -> Stored {
    Stored {
        block_hashes: hashes([1, 2]),
        parent: None,
        token_ids: (0..8).collect(),
        block_size: 4,
        medium: "gpu".into(),
        group: None,
        kind: None,
        sliding_window: None,
        lora: None,
        cache_salt: None,
        extras: None,
        bare_images: false,
        model: None,
    }
}

fn hashes<const N: usize>(values: [u64; N]) -> Vec<EngineHash> {
    values.map(EngineHash::from_int).into()
}

fn removed(block_hashes: Vec<EngineHash>, medium: &str) -> Event {
    Event::Removed(Removed { block_hashes, medium: medium.into(), group: None })
}

/// All payloads of the captures of the engine.
fn golden() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/golden");
    let mut files: Vec<_> =
        fs::read_dir(folder).expect("the captures").map(|file| file.expect("a file").path()).collect();
    files.sort();
    let texts = files.iter().map(|file| fs::read_to_string(file).expect("text"));
    let payloads: Vec<_> = texts
        .flat_map(|text| {
            let hex = text.lines().filter_map(|line| line.split_once("\"payload\":\"")?.1.split_once('"'));
            hex.map(|(hex, _)| unhex(hex)).collect::<Vec<_>>()
        })
        .collect();
    assert!(payloads.len() > 1000);
    payloads
}

fn unhex(text: &str) -> Vec<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16).expect("a hex digit") as u8;
    text.as_bytes().chunks_exact(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().take(4000).map(|byte| format!("{byte:02x}")).collect()
}

// ---- dialects

#[test]
fn captures_decode_without_discards() {
    let mut events = 0;
    for payload in golden() {
        let batch = decode(&payload).unwrap_or_else(|error| panic!("{error}: {}", hex(&payload)));
        assert_eq!(batch.discards, [], "{}", hex(&payload));
        assert!(batch.ts > 1e9 && batch.rank.is_some() && !batch.events.is_empty());
        events += batch.events.len();
    }
    assert!(events > 2000);
}

#[test]
fn captures_that_are_cut_short_or_go_on_are_refused() {
    for payload in golden().iter().step_by(50) {
        for len in 0..payload.len() {
            assert_eq!(decode(&payload[..len]).expect_err("half a batch").reason, "bad_msgpack");
        }
        let more = [payload, &[0xc0][..]].concat();
        assert_eq!(decode(&more).expect_err("more than a batch").reason, "bad_msgpack");
    }
}

#[test]
fn vllm_arrays_of_every_version() {
    let extra_keys = list![list![list!["img", 2]], Nil];
    let full = [
        "BlockStored".into(),
        ints([1, 2]),
        9.into(),
        ints(0..8),
        4.into(),
        7.into(),
        "CPU".into(),
        "ad".into(),
        extra_keys,
        3.into(),
        "sliding_window".into(),
        16.into(),
        "more".into(),
        map!["to" => "come"],
    ]; // as 0.23 has it, and beyond
    for len in 5..=full.len() {
        let has = |field: usize| len > field;
        let expected = Stored {
            parent: Some(EngineHash(9)),
            medium: if has(6) { "cpu" } else { "gpu" }.into(),
            lora: match len {
                ..=5 => None,
                6 | 7 => Some(Lora::Number(7)),
                _ => Some(Lora::Name("ad".into())),
            },
            extras: has(8).then(|| vec![list![list!["img", 2]].bytes(), vec![]]),
            group: has(9).then_some(3),
            kind: has(10).then(|| "sliding_window".into()),
            sliding_window: has(11).then_some(16),
            ..plain_store()
        };
        assert_eq!(stored_of(full[..len].to_vec().into()), expected, "{len} items");
    }
    let removal = ["BlockRemoved".into(), ints([1]), "GPU".into(), 3.into(), "more".into()];
    for len in 2..=removal.len() {
        let expected = Removed { block_hashes: hashes([1]), medium: "gpu".into(), group: (len > 3).then_some(3) };
        assert_eq!(event_of(removal[..len].to_vec().into()), Event::Removed(expected), "{len} items");
    }
    assert_eq!(event_of(list!["AllBlocksCleared"]), Event::Cleared);
    assert_eq!(event_of(list!["AllBlocksCleared", 1, "more"]), Event::Cleared);
}

#[test]
fn vllm_maps() {
    let event = map![
        "type" => "BlockStored", "block_hashes" => list![u64::MAX, 2], "parent_block_hash" => Nil,
        "token_ids" => ints(0..8), "block_size" => 4, "lora_id" => 1, "medium" => "GPU", "lora_name" => "ad1",
        "extra_keys" => list![list!["ad1", list!["imgA", 2], "S"], list!["ad1", list!["imgA", -2]]],
        "group_idx" => 0, "kv_cache_spec_kind" => "full_attention", "locality" => "LOCAL", "ownership" => Nil,
        "session_id" => "s", "lookahead_token_ids" => list![list![1], Nil], 5 => "a key of another type",
        Item::List([vec![list!["x"]], vec![Nil; 15]].concat()) => "a tuple", Item::List(vec![Nil; 17]) => "another",
    ];
    let expected = Stored {
        block_hashes: hashes([u64::MAX, 2]),
        lora: Some(Lora::Name("ad1".into())),
        group: Some(0),
        kind: Some("full_attention".into()),
        cache_salt: Some("S".into()),
        extras: Some(vec![list![list!["imgA", 2]].bytes(), list![list!["imgA", -2]].bytes()]),
        ..plain_store()
    };
    assert_eq!(stored_of(event), expected);
    let event = map!["block_hashes" => ints([1]), "group_idx" => 5, "type" => "BlockRemoved"];
    assert_eq!(
        event_of(event),
        Event::Removed(Removed { block_hashes: hashes([1]), medium: "gpu".into(), group: Some(5) })
    );
    assert_eq!(event_of(map!["type" => "AllBlocksCleared"]), Event::Cleared);
}

#[test]
fn batches_of_every_shape() {
    let events = || list![list!["AllBlocksCleared"]];
    let ranks = [
        (list![1.5, events()], None),
        (list![1.5, events(), Nil], None),
        (list![1.5, events(), 7], Some(7)),
        (list![1.5, events(), MAX_RANK, "more", list![Nil]], Some(MAX_RANK)),
        (map!["ts" => 1.5, "events" => events()], None),
        (map!["data_parallel_rank" => 7, "more" => Nil, "events" => events(), "ts" => 1.5], Some(7)),
        (map!["events" => 5, "ts" => Nil, "events" => events(), "ts" => 1.5, 0 => Nil], None),
    ];
    for (batch, rank) in ranks {
        let expected = Batch { ts: 1.5, rank, events: vec![Event::Cleared], discards: vec![] };
        assert_eq!(decode(&batch.bytes()), Ok(expected), "{batch:?}");
    }
    let times: [(Item, f64); 8] = [
        (0.into(), 0.0),
        ((-5).into(), -5.0),
        (1_763_932_000.into(), 1_763_932_000.0),
        (1_763_932_000_500i64.into(), 1_763_932_000.5),
        (1_763_932_000_500.0.into(), 1_763_932_000.5),
        (100_000_000_000i64.into(), 1e11),
        (u64::MAX.into(), 18_446_744_073_709_551.615),
        (Item::Raw(vec![0xca, 0x3f, 0xc0, 0, 0]), 1.5),
    ];
    for (ts, expected) in times {
        assert_eq!(
            decode(&list![ts.clone(), Item::List(vec![])].bytes()).map(|batch| batch.ts),
            Ok(expected),
            "{ts:?}"
        );
    }
}

#[test]
fn sglang() {
    let event = map![
        "type" => "BlockStored", "block_hashes" => list![-3_488_128_144_981_237_669i64, i64::MIN],
        "parent_block_hash" => -1, "token_ids" => ints(0..8), "block_size" => 4, "lora_id" => Nil,
        "medium" => "CPU_PINNED",
    ];
    let expected = Stored {
        block_hashes: hashes([-3_488_128_144_981_237_669i64 as u64, 1 << 63]),
        parent: Some(EngineHash::from_int(u64::MAX)),
        medium: "cpu_pinned".into(),
        ..plain_store()
    };
    assert_eq!(stored_of(event), expected);
    // EAGLE: pages of pairs
    let pairs = Item::List((0..8).map(|token| ints([token, token + 1])).collect());
    let event = map![
        "type" => "BlockStored", "block_hashes" => ints([1, 2]), "token_ids" => pairs, "block_size" => 4,
        "cache_salt" => "S",
    ];
    assert_eq!(stored_of(event), Stored { cache_salt: Some("S".into()), ..plain_store() });
}

#[test]
fn token_ids_count_booleans_as_python_does() {
    let event = list!["BlockStored", ints([1]), Nil, list![TRUE, Item::Raw(vec![0xc2]), 7], 4];
    assert_eq!(stored_of(event).token_ids, [1, 0, 7]);
}

#[test]
fn lmcache() {
    // a token more than the block has, a hash below zero
    let event = map![
        "type" => "BlockStored", "block_hashes" => ints([-4_611_686_018_427_387]), "parent_block_hash" => 0,
        "token_ids" => ints(0..257), "block_size" => 256, "lora_id" => Nil, "medium" => "cpu", "lora_name" => Nil,
    ];
    let expected = Stored {
        block_hashes: hashes([-4_611_686_018_427_387i64 as u64]),
        parent: Some(EngineHash(0)),
        token_ids: (0..257).collect(),
        block_size: 256,
        medium: "cpu".into(),
        ..plain_store()
    };
    assert_eq!(stored_of(event), expected);
    for len in [1, 8, 16, 32, MAX_HASH_BYTES] {
        let event = list!["BlockRemoved", list![vec![7u8; len]], "CPU"];
        assert_eq!(event_of(event), removed(vec![EngineHash::from_bytes(&vec![7; len])], "cpu"));
    }
}

#[test]
fn events_packed_as_bytes() {
    let packed = list!["BlockStored", ints([1, 2]), 0, Item::List(vec![]), 0, Nil, "SHARED_STORAGE"].bytes();
    let expected = Stored {
        parent: Some(EngineHash(0)),
        token_ids: vec![],
        block_size: 0,
        medium: "shared_storage".into(),
        ..plain_store()
    };
    assert_eq!(stored_of(packed.into()), expected);
    let packed = map!["type" => "BlockRemoved", "block_hashes" => ints([1]), "medium" => "Object_Store"].bytes();
    assert_eq!(event_of(packed.into()), removed(hashes([1]), "object_store"));
}

#[test]
fn mooncake() {
    let event = map![
        "event_id" => 42, "timestamp" => 1_763_932_000_500i64, "event_type" => "stored", "tenant_id" => "default",
        "medium" => "disk", "object_key" => "0x499602d2", "seq_hashes" => ints([1, 2]), "block_hashes" => Nil,
        "base_block_idx" => 0, "parent_hash" => 5, "token_ids" => ints(0..8), "block_size" => 4, "model_name" => "m",
        "additional_salt" => "S", "lora_name" => Nil, "dp_rank" => Nil,
    ];
    let expected =
        Stored { parent: Some(EngineHash(5)), medium: "disk".into(), model: Some("m".into()), ..plain_store() };
    assert_eq!(stored_of(event), expected);
    // the master's own: both tags, no tokens; of the two names of a parent the one that says something
    let event = map![
        "event_type" => "stored", "type" => "BlockStored", "seq_hashes" => ints([1]), "block_hashes" => ints([-1]),
        "parent_hash" => 5, "parent_block_hash" => Nil, "token_ids" => Nil, "block_size" => Nil, "medium" => "cpu",
        "additional_salt" => "S",
    ];
    let expected = Stored {
        block_hashes: hashes([u64::MAX]),
        token_ids: vec![],
        block_size: 0,
        medium: "cpu".into(),
        parent: Some(EngineHash(5)),
        ..plain_store()
    };
    assert_eq!(stored_of(event), expected);
    // blocks that do not begin their prompt are no root, whoever comes before them
    let event = |place: Item| {
        map!["event_type" => "stored", "seq_hashes" => ints([1, 2]), "base_block_idx" => place, "parent_hash" => Nil,
             "token_ids" => ints(0..8), "block_size" => 4]
    };
    assert_eq!(stored_of(event(3.into())), Stored { parent: Some(EngineHash(0)), ..plain_store() });
    for place in [0.into(), Nil, "3".into()] {
        assert_eq!(stored_of(event(place)), plain_store());
    }
    assert_eq!(event_of(map!["event_type" => "removed", "seq_hashes" => ints([5])]), removed(hashes([5]), "gpu"));
    assert_eq!(event_of(map!["event_type" => "cleared"]), Event::Cleared);
}

#[test]
fn salts_adapters_and_images_in_extra_keys() {
    let digest = "ab".repeat(32);
    let store = |parent: Item, lora: Item, keys: Item| {
        map!["type" => "BlockStored", "block_hashes" => ints([1, 2]), "parent_block_hash" => parent,
             "token_ids" => ints(0..8), "block_size" => 4, "lora_name" => lora, "extra_keys" => keys]
    };
    let bare = |keys: Item| list!["BlockStored", ints([1, 2]), Nil, ints(0..8), 4, Nil, "GPU", Nil, keys];
    let ad = || Some(Lora::Name("ad".into()));
    let kept = |first: Item, second: Item| {
        let bytes = |item: Item| if matches!(item, Nil) { vec![] } else { item.bytes() };
        Some(vec![bytes(first), bytes(second)])
    };
    let cases = [
        // a salt that equals the adapter's name
        (store(Nil, "ad".into(), list![list!["ad", "ad"], list!["ad"]]), ad(), Some("ad"), None),
        (store(Nil, "ad".into(), list![list!["ad"], list!["ad"]]), ad(), None, None),
        // the last of two counts; an empty one is none
        (store(Nil, Nil, list![list!["a", "b"], Nil]), None, Some("b"), None),
        (store(Nil, Nil, list![list!["a", ""], Nil]), None, None, None),
        // behind the root, text is kept
        (store(Nil, Nil, list![Nil, list!["x"]]), None, None, kept(Nil, list!["x"])),
        (store(9.into(), Nil, list![list!["x"], Nil]), None, None, kept(list!["x"], Nil)),
        // digests of prompt embeddings
        (store(Nil, Nil, list![list!["S", vec![1u8; 40]], Nil]), None, Some("S"), kept(list![vec![1u8; 40]], Nil)),
        // nothing said, whatever the number of items
        (store(Nil, Nil, list![Nil, Nil, Nil]), None, None, None),
        (store(Nil, Nil, list![0, "", list![]]), None, None, None),
        (store(Nil, Nil, list![]), None, None, None),
        // images of vLLM up to 0.18 are bare text
        (bare(list![list![digest.clone(), "S"], Nil]), None, Some("S"), kept(list![digest.clone()], Nil)),
        (bare(list![list!["0123456789abcde"], Nil]), None, Some("0123456789abcde"), None),
        (bare(list![list!["0123456789abcdeF"], Nil]), None, None, kept(list!["0123456789abcdeF"], Nil)),
        (store(Nil, Nil, list![list![digest.clone()], Nil]), None, Some(digest.as_str()), None),
        // and one field more says that they are not
        (
            list![
                "BlockStored",
                ints([1, 2]),
                Nil,
                ints(0..8),
                4,
                Nil,
                "GPU",
                Nil,
                list![list![digest.clone()], Nil],
                Nil
            ],
            None,
            Some(digest.as_str()),
            None,
        ),
    ];
    for (event, lora, salt, extras) in cases {
        let is_bare = matches!(event, Item::List(_)) && extras.is_some();
        let parent = matches!(&event, Item::Map(items) if !matches!(items[2].1, Nil)).then_some(EngineHash(9));
        let expected =
            Stored { lora, cache_salt: salt.map(Box::from), extras, bare_images: is_bare, parent, ..plain_store() };
        assert_eq!(stored_of(event.clone()), expected, "{event:?}");
    }
    for len in [0usize, 31, 32, 255, 256, 65_535, 65_536] {
        // written as msgspec writes it
        let event =
            store(Nil, Nil, list![list![list!["x".repeat(len), i64::MIN]], list![vec![0u8; len], list!["", u64::MAX]]]);
        let extras = stored_of(event).extras;
        assert_eq!(extras, kept(list![list!["x".repeat(len), i64::MIN]], list![vec![0u8; len], list!["", u64::MAX]]));
    }
}

// ---- bad input

#[test]
fn a_bad_event_costs_that_event_alone() {
    let raw = |bytes: &[u8]| Item::Raw(bytes.into());
    let store = |tokens: Item, size: Item| list!["BlockStored", ints([1]), Nil, tokens, size, Nil];
    let with = |key: &str, value: Item| {
        map!["type" => "BlockStored", "block_hashes" => ints([1]), "token_ids" => ints([1, 2]), "block_size" => 2,
             key => value]
    };
    let removal = |hash: Item| list!["BlockRemoved", list![hash]];
    let long = || "é".repeat(MAX_TEXT + 1);
    let cases: Vec<(Item, &str)> = vec![
        (5.into(), "bad_event"),
        (Nil, "bad_event"),
        ("BlockStored".into(), "bad_event"),
        (list![], "bad_event"),
        (list![5], "bad_event"),
        (list![list!["BlockRemoved"], list![1]], "bad_event"),
        (map![], "bad_event"),
        (map!["type" => 5, "event_type" => "cleared"], "bad_event"),
        (map!["type" => vec![1u8], "event_type" => "cleared"], "bad_event"),
        (map!["event_type" => 5], "bad_event"),
        (raw(&[0xd6, 0xff, 0, 0, 0, 1]), "bad_event"),
        (raw(&[0xd4, 5, 0]), "bad_event"),
        (vec![0x05u8].into(), "bad_event"),
        (list!["Never"].bytes().into(), "unknown_event"),
        (list!["Never", 1, list![2]], "unknown_event"),
        (map!["type" => "stored"], "unknown_event"),
        (map!["type" => "", "event_type" => "stored"], "unknown_event"),
        (map!["event_type" => "BlockStored"], "unknown_event"),
        (vec![0xc1u8].into(), "bad_msgpack"),
        (Item::Bytes(vec![]), "bad_msgpack"),
        (vec![0xa1u8, 0x80].into(), "bad_msgpack"),
        ([list!["AllBlocksCleared"].bytes(), vec![0xc0]].concat().into(), "bad_msgpack"),
        (vec![0x91u8; 5000].into(), "bad_msgpack"),
        (removal("text".into()), "bad_hash"),
        (removal(1.5.into()), "bad_hash"),
        (removal(TRUE.into()), "bad_hash"),
        (removal(Nil), "bad_hash"),
        (removal(list![1]), "bad_hash"),
        (removal(Item::Bytes(vec![])), "bad_hash"),
        (removal(vec![1; MAX_HASH_BYTES + 1].into()), "bad_hash"),
        (with("parent_block_hash", "text".into()), "bad_hash"),
        (list!["BlockRemoved"], "bad_hashes"),
        (list!["BlockRemoved", Nil], "bad_hashes"),
        (list!["BlockRemoved", 5], "bad_hashes"),
        (with("block_hashes", map![]), "bad_hashes"),
        (map!["event_type" => "removed", "seq_hashes" => 1], "bad_hashes"),
        (list!["BlockRemoved", ints([1]), 5], "bad_text"),
        (list!["BlockRemoved", ints([1]), long()], "bad_text"),
        (with("lora_name", long().into()), "bad_text"),
        (with("cache_salt", vec![1u8].into()), "bad_text"),
        (with("additional_salt", 5.into()), "bad_text"),
        (with("kv_cache_spec_kind", list![]), "bad_text"),
        (with("model_name", long().into()), "bad_text"),
        (list!["BlockRemoved", ints([1]), Nil, -1], "bad_group"),
        (with("group_idx", (MAX_GROUP + 1).into()), "bad_group"),
        (with("group_idx", TRUE.into()), "bad_group"),
        (with("kv_cache_spec_sliding_window", (MAX_WINDOW + 1).into()), "bad_window"),
        (with("kv_cache_spec_sliding_window", 1.0.into()), "bad_window"),
        (with("lora_id", (-1).into()), "bad_lora"),
        (with("lora_id", (MAX_LORA + 1).into()), "bad_lora"),
        (with("lora_id", vec![1u8].into()), "bad_lora"),
        (store(ints([-1, 2]), 2.into()), "bad_tokens"),
        (store(ints([1, 1 << 32]), 2.into()), "bad_tokens"),
        (store(list![1, "2"], 2.into()), "bad_tokens"),
        (store("12".into(), 2.into()), "bad_tokens"),
        (store(list![1, ints([1, 2])], 2.into()), "bad_tokens"),
        (store(list![ints([1, 2]), 3], 2.into()), "bad_tokens"),
        (store(list![ints([1, 2]), ints([3])], 2.into()), "bad_tokens"),
        (store(list![ints([-1, 2])], 2.into()), "bad_tokens"),
        (store(list![list![]], 2.into()), "bad_tokens"),
        (store(ints([1, 2]), 0.into()), "bad_block_size"),
        (store(ints([1, 2]), Nil), "bad_block_size"),
        (store(ints([1, 2]), (-2).into()), "bad_block_size"),
        (store(ints([1, 2]), (MAX_BLOCK_SIZE + 1).into()), "bad_block_size"),
        (store(list![], 2.5.into()), "bad_block_size"),
        (list!["BlockStored", ints([1, 2, 3]), Nil, ints([1, 2, 3]), 2], "too_few_tokens"),
        (with("extra_keys", "x".into()), "bad_extra_keys"),
        (with("extra_keys", list![list!["x"], Nil]), "bad_extra_keys"),
        (with("extra_keys", list![5]), "bad_extra_keys"),
        (with("extra_keys", list![-1.0]), "bad_extra_keys"),
        (with("extra_keys", list![f64::NAN]), "bad_extra_keys"),
        (with("extra_keys", list![list![5.5]]), "bad_extra_keys"),
        (with("extra_keys", list![list![list!["x"]]]), "bad_extra_keys"),
        (with("extra_keys", list![list![list!["x", 1.0]]]), "bad_extra_keys"),
        (with("extra_keys", list![list![list!["x", TRUE]]]), "bad_extra_keys"),
        (with("extra_keys", list![list![list![vec![1u8], 1]]]), "bad_extra_keys"),
    ];
    let good = |name| removed(hashes([name]), "gpu");
    for (bad, reason) in cases {
        let batch = decode(&batch_of(vec![removal(1.into()), bad.clone(), removal(2.into()), bad.clone()]));
        let expected = Batch { ts: 1.5, rank: Some(0), events: vec![good(1), good(2)], discards: vec![(reason, 2)] };
        assert_eq!(batch, Ok(expected), "{bad:?}");
    }
}

#[test]
fn of_several_faults_the_first_is_named() {
    let faults: Vec<(&str, Item, &str)> = vec![
        ("block_hashes", 5.into(), "bad_hashes"),
        ("token_ids", "x".into(), "bad_tokens"),
        ("block_size", 1.5.into(), "bad_block_size"),
        ("block_size", 0.into(), "bad_block_size"),
        ("block_size", 8.into(), "too_few_tokens"),
        ("lora_name", 5.into(), "bad_text"),
        ("additional_salt", 5.into(), "bad_text"),
        ("extra_keys", 5.into(), "bad_extra_keys"),
        ("parent_block_hash", "x".into(), "bad_hash"),
        ("medium", 5.into(), "bad_text"),
        ("group_idx", (-1).into(), "bad_group"),
        ("kv_cache_spec_kind", 5.into(), "bad_text"),
        ("kv_cache_spec_sliding_window", (-1).into(), "bad_window"),
        ("lora_id", (-1).into(), "bad_lora"),
        ("model_name", 5.into(), "bad_text"),
    ];
    let good: Vec<(Item, Item)> = vec![
        ("type".into(), "BlockStored".into()),
        ("block_hashes".into(), ints([1, 2])),
        ("token_ids".into(), ints(0..8)),
        ("block_size".into(), 4.into()),
        ("medium".into(), "ÉX".into()),
    ];
    for mended in 0..=faults.len() {
        // of each name the last value counts
        let left = faults[mended..].iter().rev().map(|(name, bad, _)| (Item::from(*name), bad.clone()));
        let event = Item::Map(good.iter().cloned().chain(left).collect());
        match faults.get(mended) {
            Some((_, _, reason)) => {
                let batch = decode(&batch_of(vec![event])).expect("a batch");
                assert_eq!(batch.discards, [(*reason, 1)], "without the first {mended}");
            }
            None => assert_eq!(stored_of(event), Stored { medium: "éx".into(), ..plain_store() }),
        }
    }
}

#[test]
fn a_broken_batch_is_refused_with_its_reason() {
    let raw = |bytes: &[u8]| bytes.to_vec();
    let inside = |bytes: &[u8]| list![1.0, list![], 0, Item::Raw(bytes.into())].bytes();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (raw(b""), "bad_msgpack"),
        (raw(&[0xc1]), "bad_msgpack"),
        (raw(&[0xdd, 0xff, 0xff, 0xff, 0xff]), "bad_msgpack"),
        (raw(&[0xdf, 0xff, 0xff, 0xff, 0xff]), "bad_msgpack"),
        (raw(&[0xdb, 0xff, 0xff, 0xff, 0xff]), "bad_msgpack"),
        (inside(&[0xa2, 0xc3, 0x28]), "bad_msgpack"),
        (inside(&[0xa3, 0xed, 0xa0, 0x80]), "bad_msgpack"),
        (inside(&[0x81, 0x81, 0x01, 0x02, 0x03]), "bad_msgpack"),
        (inside(&[0x81, 0xa1, 0xff, 0x03]), "bad_msgpack"),
        (inside(&[0xc7, 3, 0xff, 0, 0, 0]), "bad_msgpack"),
        (inside(&[0xd7, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]), "bad_msgpack"),
        // msgspec makes lists of what is in a long tuple
        (inside(&map![Item::List([vec![list![]], vec![Nil; 16]].concat()) => 1].bytes()), "bad_msgpack"),
        (raw(&[0x01]), "bad_batch"),
        (raw(&[0xc0]), "bad_batch"),
        (Item::from("text").bytes(), "bad_batch"),
        (list![].bytes(), "bad_batch"),
        (list![1.0].bytes(), "bad_batch"),
        (list![Nil, list![]].bytes(), "bad_batch"),
        (list![TRUE, list![]].bytes(), "bad_batch"),
        (list![1.0, map![]].bytes(), "bad_batch"),
        (list![1.0, Nil, -1].bytes(), "bad_batch"),
        (map![].bytes(), "bad_batch"),
        (map!["ts" => 1.0].bytes(), "bad_batch"),
        (map!["ts" => "1", "events" => list![]].bytes(), "bad_batch"),
        (map!["ts" => 1.0, "events" => list![], "events" => Nil].bytes(), "bad_batch"),
        (list![1.0, list![], -1].bytes(), "bad_rank"),
        (list![1.0, list![], MAX_RANK + 1].bytes(), "bad_rank"),
        (list![1.0, list![], 1.0].bytes(), "bad_rank"),
        (list![1.0, list![], "0"].bytes(), "bad_rank"),
        (list![1.0, list![], TRUE].bytes(), "bad_rank"),
        (map!["ts" => 1, "events" => list![], "data_parallel_rank" => list![]].bytes(), "bad_rank"),
        (list![1.0, vec![Nil; MAX_EVENTS + 1], -1].bytes(), "bad_rank"),
        (list![1.0, vec![Nil; MAX_EVENTS + 1]].bytes(), "too_many_events"),
    ];
    for (payload, reason) in cases {
        assert_eq!(decode(&payload).expect_err(reason).reason, reason, "{}", hex(&payload));
    }
}

#[test]
fn values_that_nobody_asks_for_are_read_to_their_end() {
    let is_last = |bytes: &[u8]| decode(&list![1.5, list![], 0, Item::Raw(bytes.into())].bytes()).is_ok();
    let is_read = |bytes: &[u8]| {
        let value = || Item::Raw(bytes.into());
        let events = [
            map!["type" => "AllBlocksCleared", "x" => value()],
            map!["type" => "AllBlocksCleared", "medium" => value()],
            list!["BlockRemoved", value(), value()],
        ];
        let is_ok = is_last(bytes);
        assert!(events.into_iter().all(|event| decode(&batch_of(vec![event])).is_ok() == is_ok), "{}", hex(bytes));
        is_ok
    };
    let mut values: Vec<Vec<u8>> = (0xca..=0xd3u8).map(|tag| [&[tag][..], &[0xff; 8]].concat()).collect();
    for (value, size) in values.iter_mut().zip([4, 8, 1, 2, 4, 8, 1, 2, 4, 8]) {
        value.truncate(1 + size);
    }
    values.extend([&[0u8][..], &[0x7f], &[0xe0], &[0xff], &[0xc0], &[0xc2], &[0xc3]].map(Vec::from));
    values.extend([0, 1, 31, 32, 256, 65_536].map(|len| Item::from("x".repeat(len)).bytes()));
    values.extend([0, 1, 256, 65_536].map(|len| Item::from(vec![0xff; len]).bytes()));
    values.extend([0, 15, 16, 65_536].map(|len| ints(0..len).bytes()));
    values.extend((0..5).map(|power| [&[0xd4 + power, 5][..], &vec![0xff; 1 << power]].concat()));
    values.extend(
        [&[0xc7, 0, 5][..], &[0xc7, 2, 5, 1, 2], &[0xc8, 0, 1, 5, 9], &[0xc9, 0, 0, 0, 1, 5, 9]].map(Vec::from),
    );
    values.push(map![1 => 2, "x" => list![Nil], vec![1u8] => map![]].bytes());
    for value in values {
        assert!(is_read(&value), "{}", hex(&value));
        // what follows is another value, and then the lengths do not fit
        assert!(!is_last(&[&value[..], &[0xc0]].concat()), "{}", hex(&value));
        for len in (0..value.len()).take(40) {
            assert!(!is_last(&value[..len]), "{}", hex(&value[..len]));
        }
    }
    for bad in
        [&b"\xa1\xff"[..], b"\xa2\xc3\x28", b"\xa3\xed\xa0\x80", b"\xd9\x01\x80", b"\xa4\xf4\x90\x80\x80", b"\xc1"]
    {
        assert!(!is_read(bad), "{}", hex(bad));
        assert!(!is_read(&[&[0x91][..], bad].concat()), "{}", hex(bad));
        assert!(!is_read(&[&[0x81][..], bad, &[0xc0]].concat()), "{}", hex(bad));
    }
    // the years from 1 to 9999, rounded to microseconds
    let (first, last) = (-62_135_596_800i64, 253_402_300_799i64);
    for (nanos, seconds, fits) in [
        (0, 0, true),
        (999_999_999, 0, true),
        (1_000_000_000, 0, false),
        (0, first, true),
        (0, first - 1, false),
        (999_999_999, last - 1, true),
        (999_999_499, last, true),
        (999_999_500, last, false),
        (0, last + 1, false),
        (0, i64::MIN, false),
        (0, i64::MAX, false),
    ] {
        let stamp = [&b"\xc7\x0c\xff"[..], &u32::to_be_bytes(nanos), &seconds.to_be_bytes()].concat();
        assert_eq!(is_read(&stamp), fits, "{nanos} {seconds}");
    }
    for (nanos, fits) in [(0, true), (999_999_999, true), (1_000_000_000u64, false)] {
        assert_eq!(is_read(&[&b"\xd7\xff"[..], &(nanos << 34 | 5).to_be_bytes()].concat()), fits, "{nanos}");
    }
}

#[test]
fn limits_are_reached_but_not_passed() {
    let many = |count: usize| Item::Raw([&[0xdd][..], &(count as u32).to_be_bytes(), &vec![1; count]].concat());
    let reason = |event: Item| decode(&batch_of(vec![event])).expect("a batch").discards;
    let removal = |count| list!["BlockRemoved", many(count)];
    let store = |count| list!["BlockStored", list![], Nil, many(count), MAX_BLOCK_SIZE];
    assert_eq!(reason(removal(MAX_HASHES)), []);
    assert_eq!(reason(removal(MAX_HASHES + 1)), [("too_many_hashes", 1)]);
    assert_eq!(reason(store(MAX_TOKENS)), []);
    assert_eq!(reason(store(MAX_TOKENS + 1)), [("too_many_tokens", 1)]);
    let full = map![
        "type" => "BlockStored", "block_hashes" => ints([1]), "medium" => "é".repeat(MAX_TEXT),
        "group_idx" => MAX_GROUP, "kv_cache_spec_sliding_window" => MAX_WINDOW, "lora_id" => MAX_LORA,
        "block_size" => MAX_BLOCK_SIZE,
    ];
    assert_eq!(reason(full), []);
    let events = vec![list!["AllBlocksCleared"]; MAX_EVENTS];
    assert_eq!(decode(&batch_of(events)).map(|batch| batch.events.len()), Ok(MAX_EVENTS));
}

/// What takes most for its length; `decode` looks at how much.
#[test]
fn memory_stays_in_proportion() {
    let ones = || ints(vec![1; 60_000]);
    let events = [
        vec![list!["BlockRemoved", list![]]; MAX_EVENTS],
        vec![list!["BlockRemoved", list![], "x"]; MAX_EVENTS],
        vec![
            map!["type" => "BlockRemoved", "block_hashes" => ones(), "seq_hashes" => ones(), "block_hashes" => ones()],
        ],
        vec![list![
            "BlockStored",
            ones(),
            Nil,
            ones(),
            1,
            Nil,
            Nil,
            Nil,
            Item::List([vec![list!["", ""]], vec![Nil; 59_999]].concat())
        ]],
        vec![list!["BlockStored", ones(), Nil, ones(), 1, Nil, Nil, Nil, vec![list![vec![1u8; 1]]; 60_000]]],
    ];
    for events in events {
        let count = events.len();
        assert_eq!(decode(&batch_of(events)).map(|batch| batch.events.len()), Ok(count));
    }
    for head in [&[0xdc, 0xff, 0xff][..], &[0xdd, 0, 0, 0xff, 0xff]] {
        // lists that say they are as long as all that follows, one in the other
        let lies = head.repeat(20_000);
        for key in ["token_ids", "block_hashes", "extra_keys"] {
            let lie = map!["type" => "BlockStored", key => Item::Raw(lies.clone())].bytes();
            assert!(decode(&batch_of(vec![lie.clone().into(), lie.into()])).is_ok_and(|batch| batch.events.is_empty()));
        }
    }
}

#[test]
fn nesting_is_bounded_not_by_the_stack() {
    let nested = |head: &[u8], depth: usize| [head.repeat(depth), vec![0xc0]].concat();
    let work = move || {
        for head in [&[0x91][..], &[0x81, 0xc0]] {
            let limit = MAX_DEPTH as usize;
            for (depth, fits) in [(limit, true), (limit + 1, false), (1_000_000, false)] {
                let value = || Item::Raw(nested(head, depth));
                let payloads = [
                    list![1.5, list![], 0, value()].bytes(),
                    map!["ts" => 1.5, "events" => list![], "more" => value()].bytes(),
                    list![1.5, list![map!["type" => "AllBlocksCleared", "more" => value()]]].bytes(),
                    list![1.5, list![list!["AllBlocksCleared", value()]]].bytes(),
                ];
                for payload in payloads {
                    assert_eq!(decode(&payload).map_err(|error| error.reason).err(), (!fits).then_some("bad_msgpack"));
                }
            }
            let packed = batch_of(vec![list!["AllBlocksCleared", Item::Raw(nested(head, 1_000_000))].bytes().into()]);
            assert_eq!(decode(&packed).expect("a batch").discards, [("bad_msgpack", 1)]);
        }
        // keys nest as well
        let key = [vec![0x81], nested(&[0x91], 1_000_000), vec![0xc0]].concat();
        assert_eq!(decode(&list![1.5, list![], 0, Item::Raw(key)].bytes()).expect_err("deep").reason, "bad_msgpack");
    };
    thread::Builder::new().stack_size(1 << 20).spawn(work).expect("a thread").join().expect("no overflow");
}

#[test]
fn the_decoder_is_safe_code() {
    // what the compiler checks cannot read out of bounds
    let sources = [
        include_str!("../src/wire.rs"),
        include_str!("../src/wire/event.rs"),
        include_str!("../src/wire/extras.rs"),
        include_str!("../src/wire/fields.rs"),
        include_str!("../src/wire/media.rs"),
        include_str!("../src/wire/reader.rs"),
        include_str!("../src/wire/tokens.rs"),
        include_str!("../src/msgpack.rs"),
    ];
    assert!(sources.iter().all(|source| !source.contains("unsafe")));
}

// ---- a great many payloads

/// Xorshift, as Marsaglia has it.
struct Random(u64);

impl Random {
    const fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() >> 16) as usize % end.max(1)
    }

    fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    const fn byte(&mut self) -> u8 {
        (self.next() >> 24) as u8
    }
}

/// Writes an integer in any of the forms that can hold it.
fn write_loosely(random: &mut Random, value: u64, out: &mut Vec<u8>) {
    let least = match value {
        0..=0x7f => 0,
        0x80..=0xff => 1,
        0x100..=0xffff => 2,
        0x1_0000..=0xffff_ffff => 3,
        _ => 4,
    };
    // mostly short, as encoders have it
    let form = if random.below(64) == 0 { least + random.below(5 - least) } else { least };
    match form {
        0 => out.push(value as u8),
        _ => {
            out.push(0xcb + form as u8);
            out.extend(&value.to_be_bytes()[8 - (1 << (form - 1))..]);
        }
    }
}

#[test]
fn lists_of_integers_in_any_form() {
    let mut random = Random(7);
    for round in 0..3000 {
        let len = if round % 8 == 0 { random.below(3000) } else { random.below(40) };
        let widest = random.below(33);
        let tokens: Vec<u32> =
            (0..len).map(|_| ((random.next() >> 20) & ((1 << random.below(widest + 1)) - 1)) as u32).collect();
        let names: Vec<u64> = (0..random.below(20)).map(|_| random.next() >> random.below(64)).collect();
        let mut payload = b"\x92\x01\x91\x95\xabBlockStored\xdc".to_vec();
        payload.extend((names.len() as u16).to_be_bytes());
        names.iter().for_each(|name| write_loosely(&mut random, *name, &mut payload));
        payload.extend(b"\xc0\xdd");
        payload.extend((len as u32).to_be_bytes());
        tokens.iter().for_each(|token| write_loosely(&mut random, (*token).into(), &mut payload));
        payload.push(1);
        let batch = decode(&payload).unwrap_or_else(|error| panic!("{error}: {}", hex(&payload)));
        if len > 0 && names.len() > len {
            assert_eq!(batch.discards, [("too_few_tokens", 1)]);
            continue;
        }
        let [Event::Stored(stored)] = &batch.events[..] else { panic!("{batch:?} from {}", hex(&payload)) };
        assert_eq!(stored.token_ids, tokens, "{}", hex(&payload));
        assert!(stored.block_hashes.iter().map(|hash| hash.as_int()).eq(names.into_iter().map(Some)));
        // one id that is none, anywhere
        if len > 0 {
            let bad = payload.len() - 2;
            payload[bad] |= 0xe0; // the last byte of the last id, or all of it
            assert!(decode(&payload).is_ok_and(|batch| batch.events.len() + batch.discards.len() == 1));
        }
    }
}

/// Where the value at `at` ends, and where the values in it begin, itself first; as far as the bytes go.
fn walk(bytes: &[u8], at: usize, starts: &mut Vec<usize>) -> Option<usize> {
    let tag = *bytes.get(at)?;
    starts.push(at);
    let number = |size: usize| {
        let bytes = bytes.get(at + 1..at + 1 + size)?;
        Some(bytes.iter().fold(0, |number, byte| number << 8 | usize::from(*byte)))
    };
    let head = |size: usize| at + 1 + size;
    let (mut end, items) = match tag {
        0x80..=0x8f => (head(0), 2 * usize::from(tag & 15)),
        0x90..=0x9f => (head(0), usize::from(tag & 15)),
        0xa0..=0xbf => (head(usize::from(tag & 31)), 0),
        0xc4..=0xc6 => (head(1 << (tag - 0xc4)) + number(1 << (tag - 0xc4))?, 0),
        0xd9..=0xdb => (head(1 << (tag - 0xd9)) + number(1 << (tag - 0xd9))?, 0),
        0xc7..=0xc9 => (head(1 << (tag - 0xc7)) + 1 + number(1 << (tag - 0xc7))?, 0),
        0xd4..=0xd8 => (head(1 + (1 << (tag - 0xd4))), 0),
        0xdc | 0xdd => (head(2 << (tag - 0xdc)), number(2 << (tag - 0xdc))?),
        0xde | 0xdf => (head(2 << (tag - 0xde)), 2 * number(2 << (tag - 0xde))?),
        0xcc..=0xcf => (head(1 << (tag - 0xcc)), 0),
        0xd0..=0xd3 => (head(1 << (tag - 0xd0)), 0),
        0xca | 0xcb => (head(4 << (tag - 0xca)), 0),
        _ => (head(0), 0),
    };
    for _ in 0..items {
        if starts.len() > 4000 {
            return None;
        }
        end = walk(bytes, end, starts)?;
    }
    Some(end)
}

/// Values in the wrong place, and values at the limits.
fn odd_values() -> Vec<Vec<u8>> {
    let texts = [0, 1, 31, 32, 255, 256, MAX_TEXT, MAX_TEXT + 1].map(|len| Item::from("x".repeat(len)).bytes());
    let bytes =
        [0, 1, 8, 16, 32, MAX_HASH_BYTES, MAX_HASH_BYTES + 1, 300].map(|len| Item::from(vec![7u8; len]).bytes());
    let edges = [0, 1, 7, 8, 15, 16, 31, 32, 33, 63, 64].map(|bits| 1i128 << bits);
    let ints = edges.into_iter().flat_map(|edge| [edge - 1, edge, edge + 1, -edge, 1 - edge]);
    let ints = ints.filter(|value| (-(1 << 63)..1 << 64).contains(value)).map(|value| Item::Int(value).bytes());
    let floats = [0.0, -0.0, 1.5, 1e11, 1e12, 1e300, f64::NAN, f64::INFINITY].map(|value| Item::from(value).bytes());
    let words = ["BlockStored", "BlockRemoved", "AllBlocksCleared", "stored", "removed", "cleared", "GPU", "ts", "é"];
    let words = words.map(|word| Item::from(word).bytes());
    let raw: [&[u8]; 20] = [
        b"\xc0",
        b"\xc1",
        b"\xc2",
        b"\xc3",
        b"\x90",
        b"\x80",
        b"\x91\xc0",
        b"\x92\x01\x02",
        b"\x92\xa1x\x01",
        b"\x81\xc0\xc0",
        b"\x91\x92\xa1x\x01",
        b"\xd6\xff\0\0\0\x01",
        b"\xd7\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\xd4\x05\0",
        b"\xc7\x0c\xff\0\0\0\0\0\0\0\0\0\0\0\0",
        b"\xc7\0\xff",
        b"\xa1\xff",
        b"\xa2\xc3\x28",
        b"\x82\xc0\xc0\xc0\xc0",
        b"\x81\xd4\x05\0\x01",
    ];
    let raw = raw.map(Vec::from);
    let deep = [3, 200, 255, 256, 257, 2000].map(|depth| [vec![0x91; depth], vec![0xc0]].concat());
    texts.into_iter().chain(bytes).chain(ints).chain(floats).chain(words).chain(raw).chain(deep).collect()
}

/// Payloads to begin with: real ones, and made ones that hold every field of every dialect.
fn corpus() -> Vec<Vec<u8>> {
    let tokens = || ints((0..8).map(|number| number * 9000));
    let extras = || list![list!["ad", list!["img", 2], "S", vec![1u8; 32]], list!["ad", list!["img", -2], "x"]];
    let fields = ["seq_hashes", "parent_hash", "additional_salt", "cache_salt", "model_name", "locality", "session_id"];
    let mut map_event = map![
        "type" => "BlockStored", "event_type" => "stored", "block_hashes" => list![1, vec![2u8; 32]],
        "parent_block_hash" => -9, "token_ids" => tokens(), "block_size" => 4, "lora_id" => 3, "medium" => "CPU_PINNED",
        "lora_name" => "ad", "extra_keys" => extras(), "group_idx" => 2, "kv_cache_spec_kind" => "sliding_window",
        "kv_cache_spec_sliding_window" => 16,
    ];
    if let Item::Map(items) = &mut map_event {
        items.extend(fields.map(|field| (field.into(), Nil)));
    }
    let array_event = list![
        "BlockStored",
        list![u64::MAX, -2],
        Nil,
        tokens(),
        4,
        7,
        "GPU",
        "ad",
        extras(),
        1,
        "full_attention",
        9,
        "more",
    ];
    let bare =
        list!["BlockStored", ints([1, 2]), Nil, tokens(), 4, 7, "GPU", Nil, list![list!["ab".repeat(32), "S"], Nil]];
    let rfc = map![
        "event_id" => 1, "event_type" => "stored", "seq_hashes" => ints([5, 6]), "block_hashes" => Nil,
        "medium" => "disk", "parent_hash" => 4, "token_ids" => tokens(), "block_size" => 4, "additional_salt" => "S",
        "model_name" => "m",
    ];
    let pairs = Item::List((0..8).map(|token| ints([token, token + 1])).collect());
    let eagle = map!["type" => "BlockStored", "block_hashes" => ints([1]), "token_ids" => pairs, "block_size" => 8];
    let removal = list!["BlockRemoved", list![1, vec![3u8; 16], -4], "CPU", 1];
    let clear = map!["type" => "AllBlocksCleared"];
    let all = [map_event, array_event, bare, rfc, eagle, removal, clear];
    let mut payloads: Vec<Vec<u8>> = all.iter().map(|event| batch_of(vec![event.clone()])).collect();
    payloads.push(batch_of(all.to_vec()));
    payloads.push(batch_of(all.iter().map(|event| event.bytes().into()).collect()));
    payloads.push(map!["ts" => 1_763_932_000_500i64, "events" => all.to_vec(), "data_parallel_rank" => 3].bytes());
    payloads.push(batch_of(vec![list!["BlockRemoved", list![]]; 200]));
    payloads.push(batch_of(vec![
        map!["type" => "BlockRemoved", "block_hashes" => ints(0..100), "seq_hashes" => ints(0..100)],
    ]));
    // as many of these as of the captures
    let captures: Vec<_> = golden().into_iter().filter(|payload| payload.len() < 1500).step_by(5).collect();
    let copies = captures.len() / payloads.len();
    iter::repeat_n(payloads, copies).flatten().chain(captures).collect()
}

struct Mutator {
    random: Random,
    corpus: Vec<Vec<u8>>,
    odd: Vec<Vec<u8>>,
    starts: Vec<usize>,
}

impl Mutator {
    fn payload(&mut self) -> Vec<u8> {
        let mut payload = self.random.one(&self.corpus).clone();
        for _ in 0..=self.random.below(4) {
            self.mutate(&mut payload);
        }
        payload
    }

    fn mutate(&mut self, payload: &mut Vec<u8>) {
        let place = self.random.below(payload.len() + 1);
        let span = place..(place + self.random.below(16)).min(payload.len());
        match self.random.below(16) {
            0 => {
                if let Some(byte) = payload.get_mut(place) {
                    *byte ^= 1 << self.random.below(8);
                }
            }
            1 => {
                if let Some(byte) = payload.get_mut(place) {
                    *byte = 0xc0 + (self.random.byte() & 0x1f);
                }
            }
            2 => payload.truncate(place),
            3 => payload.insert(place, self.random.byte()),
            4 => drop(payload.drain(span)),
            5 => {
                let copy = payload[span].to_vec();
                payload.splice(place..place, copy);
            }
            // a splice of two
            6 => {
                let other = self.random.one(&self.corpus);
                payload.truncate(place);
                payload.extend(&other[place.min(other.len())..]);
            }
            7 => self.lie(payload),
            // a value becomes another one, or goes into a list or into bytes: mostly still msgpack
            _ => self.replace(payload),
        }
    }

    /// One of the values in the payload.
    fn value(&mut self, payload: &[u8]) -> Option<std::ops::Range<usize>> {
        self.starts.clear();
        walk(payload, 0, &mut self.starts);
        if self.starts.is_empty() {
            return None;
        }
        let start = *self.random.one(&self.starts);
        self.starts.clear();
        walk(payload, start, &mut self.starts).filter(|end| *end <= payload.len()).map(|end| start..end)
    }

    fn replace(&mut self, payload: &mut Vec<u8>) {
        let Some(span) = self.value(payload) else {
            return;
        };
        let value = match self.random.below(8) {
            0 => {
                let depth = 1 + self.random.below(3);
                [vec![0x91; depth], payload[span.clone()].to_vec()].concat()
            }
            1 => Item::from(payload[span.clone()].to_vec()).bytes(),
            2 => {
                let Some(other) = self.value(payload) else {
                    return;
                };
                payload[other].to_vec()
            }
            _ => self.random.one(&self.odd).clone(),
        };
        payload.splice(span, value);
    }

    /// A list, map or text says that it is longer or shorter than it is.
    fn lie(&mut self, payload: &mut Vec<u8>) {
        let is_head = |tag: u8| matches!(tag, 0x80..=0xbf | 0xc4..=0xc9 | 0xd9..=0xdf);
        let heads: Vec<usize> = (0..payload.len()).filter(|at| is_head(payload[*at])).collect();
        if heads.is_empty() {
            return;
        }
        let at = *self.random.one(&heads);
        let wide = match payload[at] {
            0x80..=0x8f => 0xdf,
            0x90..=0x9f => 0xdd,
            0xa0..=0xbf => 0xdb,
            _ => {
                if let Some(byte) = payload.get_mut(at + 1 + self.random.below(4)) {
                    *byte = self.random.byte();
                }
                return;
            }
        };
        if self.random.below(2) == 0 {
            payload[at] ^= 1 + (self.random.byte() & 0x0e);
            return;
        }
        let len = payload.len() as u32;
        let lies = [len / 4, len / 2, len - 1, len, len + 1, 1 << 16, 1 << 24, u32::MAX];
        let len = *self.random.one(&lies);
        payload.splice(at..=at, [&[wide][..], &len.to_be_bytes()].concat());
    }
}

fn setting<T: std::str::FromStr<Err: Display>>(name: &str, usual: T) -> T {
    env::var(name).map_or(usual, |text| text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

type Outcome<'a> = (u64, Option<u32>, &'a [Event], &'a [(&'static str, u64)]);

/// What is left of a result when its texts are put aside, in a form that is equal to itself also for a NaN.
fn outcome(result: &Result<Batch, DecodeError>) -> Result<Outcome<'_>, &str> {
    match result {
        Ok(batch) => Ok((batch.ts.to_bits(), batch.rank, &batch.events, &batch.discards)),
        Err(error) => Err(error.reason),
    }
}

#[test]
fn mutated_payloads_are_decoded_or_refused() {
    let count = setting("KVINDEX_FUZZ", if cfg!(debug_assertions) { 200_000 } else { 500_000 });
    let seed = setting("KVINDEX_FUZZ_SEED", 0x9e37_79b9_7f4a_7c15u64).max(1);
    let mut mutator = Mutator { random: Random(seed), corpus: corpus(), odd: odd_values(), starts: Vec::new() };
    let (mut reasons, mut batches, mut events) = (BTreeSet::new(), 0, 0);
    for number in 0..count {
        let payload = mutator.payload();
        let result = decode(&payload);
        match &result {
            Ok(batch) => {
                batches += 1;
                events += batch.events.len();
                reasons.extend(batch.discards.iter().map(|(reason, _)| *reason));
            }
            Err(error) => {
                reasons.insert(error.reason);
            }
        }
        if number % 4 == 0 {
            // what lies around a payload does not show
            let around = [&[0xcf; 9][..], &payload, &[number as u8; 600]].concat();
            let within = decode(&around[9..9 + payload.len()]);
            assert_eq!(outcome(&within), outcome(&result), "{}", hex(&payload));
        }
    }
    // the mutations reach everywhere
    let rare = ["too_many_events", "too_many_hashes", "too_many_tokens"];
    let unseen: Vec<_> = ERRORS.iter().chain(&DISCARDS).filter(|reason| !reasons.contains(*reason)).collect();
    assert!(count < 100_000 || unseen.iter().all(|reason| rare.contains(reason)), "never seen: {unseen:?}");
    assert!(batches * 4 > count && events > count, "{batches} batches with {events} events of {count} payloads");
    println!("{count} payloads: {batches} batches, {events} events");
}
