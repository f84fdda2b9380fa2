//! The wall clock, for what stamps a message with it.

/// Nanoseconds since 1970; both peers and the product stamp their answers with it.
pub(crate) fn wall_ns() -> i64 {
    let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
