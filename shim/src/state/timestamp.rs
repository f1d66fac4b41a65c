//! Points in time as text in UTC: in RFC 3339, as runc writes them, and in the short form of `ps`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const DAY: u64 = 86_400;

/// The time now, to the nanosecond.
#[must_use]
pub fn now() -> String {
    to_text(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// The time now, in nanoseconds since 1970.
#[must_use]
pub fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// A time in nanoseconds since 1970, seen from `now_ns`: the hour and minute of the same day, month
/// and day of the same year, or the year.
#[must_use]
pub fn short(at_ns: u64, now_ns: u64) -> String {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (at, now) = (at_ns / 1_000_000_000, now_ns / 1_000_000_000);
    let (year, month, day) = date(at / DAY);
    let name = usize::try_from(month - 1).ok().and_then(|month| MONTHS.get(month));
    if at / DAY == now / DAY {
        format!("{:02}:{:02}", at % DAY / 3600, at % 3600 / 60)
    } else if year == date(now / DAY).0 {
        format!("{}{day:02}", name.unwrap_or(&"?"))
    } else {
        year.to_string()
    }
}

/// A time since 1970 as text.
#[must_use]
pub fn to_text(since_epoch: Duration) -> String {
    let seconds = since_epoch.as_secs();
    let (year, month, day) = date(seconds / DAY);
    let (hour, minute, second) = (seconds % DAY / 3600, seconds % 3600 / 60, seconds % 60);
    let nanos = since_epoch.subsec_nanos();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
}

/// The Gregorian date of a day counted from 1970-01-01. Years are counted from March, so that the
/// leap day is the last of its year.
const fn date(day: u64) -> (u64, u64, u64) {
    // 1970-01-01 is day 719468 counted from 0000-03-01.
    let day = day + 719_468;
    let (era, in_era) = (day / 146_097, day % 146_097);
    let year = (in_era - in_era / 1460 + in_era / 36_524 - in_era / 146_096) / 365;
    let in_year = in_era - (365 * year + year / 4 - year / 100);
    let march_month = (5 * in_year + 2) / 153;
    let day_of_month = in_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let from_january = if month <= 2 { 1 } else { 0 };
    (era * 400 + year + from_january, month, day_of_month)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_time_is_as_exact_as_its_age_allows() {
        let second = 1_000_000_000;
        let now = 1_709_251_199 * second;
        for (at, text) in
            [(1_709_251_000, "23:56"), (1_709_000_000, "Feb27"), (951_782_400, "2000")]
        {
            assert_eq!(short(at * second, now), text);
        }
    }

    #[test]
    fn known_times_read_as_they_should() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000000Z"),
        ] {
            assert_eq!(to_text(Duration::from_secs(seconds)), text);
        }
        assert_eq!(to_text(Duration::new(1, 42)), "1970-01-01T00:00:01.000000042Z");
    }
}
