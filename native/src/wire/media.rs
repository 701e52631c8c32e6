//! The names of media, nearly always one of a few.

use std::sync::Arc;

const KNOWN: [&str; 7] = ["gpu", "cpu", "cpu_pinned", "disk", "external", "shared_storage", "object_store"];

thread_local! {
    // for each thread its own, so that threads do not take turns at the reference counts
    static SHARED: [Arc<str>; KNOWN.len()] = KNOWN.map(Arc::from);
}

/// A medium in lower case, "gpu" where none is named.
pub fn read(medium: Option<&str>) -> Arc<str> {
    let medium = medium.unwrap_or(KNOWN[0]);
    SHARED
        .try_with(|shared| shared.iter().find(|known| known.eq_ignore_ascii_case(medium)).cloned())
        .ok()
        .flatten()
        .unwrap_or_else(|| Arc::from(medium.to_lowercase()))
}
