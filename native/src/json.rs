//! Token ids out of JSON text, which is most of what a question over HTTP is.

/// The numbers of a JSON array of whole numbers that fit a token id; none for anything else, also for what another
/// reader may take for such an array, as `[1.0]`: that one says what is wrong, or what it means.
pub fn token_ids(text: &[u8]) -> Option<Vec<u32>> {
    // most ids of today's vocabularies have five or six digits
    let mut ids = Vec::with_capacity(text.len() / 6 + 1);
    let mut rest = text.trim_ascii().strip_prefix(b"[")?.trim_ascii_start();
    if rest == b"]" {
        return Some(ids);
    }
    loop {
        let (mut id, mut digits) = (0u64, 0);
        while let Some(digit @ 0..=9) = rest.get(digits).map(|byte| byte.wrapping_sub(b'0')) {
            // ten digits are the most that fit; a leading zero is no JSON
            if digits == 10 || (digits == 1 && id == 0) {
                return None;
            }
            id = id * 10 + u64::from(digit);
            digits += 1;
        }
        if digits == 0 {
            return None;
        }
        ids.push(u32::try_from(id).ok()?);
        rest = &rest[digits..];
        if let [b',', more @ ..] = rest {
            rest = more;
        } else {
            match rest.trim_ascii_start() {
                [b',', more @ ..] => rest = more,
                [b']'] => return Some(ids),
                _ => return None,
            }
        }
        if rest.first()?.is_ascii_whitespace() {
            rest = rest.trim_ascii_start();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::token_ids;

    #[test]
    fn arrays_of_token_ids_are_read() {
        assert_eq!(token_ids(b"[]"), Some(vec![]));
        assert_eq!(token_ids(b" [ 0 , 12,\n4294967295 ] "), Some(vec![0, 12, u32::MAX]));
    }

    #[test]
    fn anything_else_is_left_to_others() {
        for text in
            ["", "[", "]", "[1", "[1,", "[1,]", "[,1]", "[1 2]", "[01]", "[-1]", "[1.0]", "[1e2]", "[4294967296]"]
                .into_iter()
                .chain(["[99999999999999999999999]", "null", "[null]", "[1]]", "[1] 2", "\"1\"", "[\"1\"]", "{}"])
        {
            assert_eq!(token_ids(text.as_bytes()), None, "{text}");
        }
    }
}
