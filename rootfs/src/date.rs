//! Dates of Release files: `Fri, 27 Nov 2026 00:12:42 UTC`.

const MONTHS: [&str; 12] = [
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
];

/// Seconds since 1970 of a Release file's date, or nothing when it has another form.
pub(crate) fn parse(text: &str) -> Option<u64> {
    let mut words = text.split_once(", ")?.1.split_whitespace();
    let day: u64 = words.next()?.parse().ok()?;
    let month = words.next()?;
    let month = MONTHS.iter().position(|name| *name == month)? as u64 + 1;
    let year: u64 = words.next()?.parse().ok()?;
    let mut clock = words.next()?.split(':').map(|part| part.parse::<u64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    let utc = matches!(words.next(), Some("UTC" | "GMT" | "+0000"));
    let sane = utc
        && (1970..10_000).contains(&year)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second < 61;
    sane.then(|| days(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second)
}

/// Days since 1970-01-01, by counting from 1 March (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms").
fn days(year: u64, month: u64, day: u64) -> u64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year / 400, year % 400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_become_seconds() {
        assert_eq!(parse("Thu, 01 Jan 1970 00:00:00 UTC"), Some(0));
        assert_eq!(parse("Thu, 29 Feb 2024 23:59:59 UTC"), Some(1_709_251_199));
        assert_eq!(parse("Fri, 27 Nov 2026 00:12:42 UTC"), Some(1_795_738_362));
    }

    #[test]
    fn other_forms_are_refused() {
        for text in [
            "",
            "2026-11-27",
            "Fri, 27 Nov 2026 00:12:42 CET",
            "Fri, 27 Foo 2026 00:12:42 UTC",
            "Fri, 99 Nov 2026 00:12:42 UTC",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
