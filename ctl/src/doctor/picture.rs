//! A diagnosis for people: each guest by layer, then the findings with what to do.

use sovereign_protocol::condition::Status;
use sovereign_protocol::finding::Finding;

use super::report::{Diagnosis, GuestPicture, Judgement, LayerPicture, Place};
use crate::context::escaped;
use crate::picture::mark;

/// Plain text, aligned, foreign text made safe.
pub(crate) fn picture(diagnosis: &Diagnosis) -> String {
    let mut lines = vec![format!("instance {}", diagnosis.instance)];
    for source in &diagnosis.sources {
        let status = if source.answered {
            Status::True
        } else {
            Status::False
        };
        lines.push(line(&format!(
            "{} {:<14} {}",
            mark(status),
            source.name,
            source.evidence
        )));
    }
    for guest in &diagnosis.guests {
        lines.extend(layers(guest));
    }
    for unseen in &diagnosis.network.unseen {
        lines.push(line(&format!("of the network not looked at: {unseen}")));
    }
    lines.push(String::new());
    match diagnosis.findings.len() {
        0 => lines.push("no finding".to_owned()),
        1 => lines.push("1 finding".to_owned()),
        count => lines.push(format!("{count} findings")),
    }
    for (index, finding) in diagnosis.findings.iter().enumerate() {
        lines.push(String::new());
        lines.extend(told(index + 1, finding));
    }
    lines.join("\n")
}

fn layers(guest: &GuestPicture) -> Vec<String> {
    let phase = guest
        .phase
        .map_or_else(|| "not watched".to_owned(), |phase| format!("{phase:?}"));
    let mut lines = vec![format!("{} {}  {phase}", mark(guest.ready), guest.name)];
    let width = |text: fn(&LayerPicture) -> &str| {
        let lengths = guest.layers.iter().map(|layer| line(text(layer)).chars().count());
        lengths.max().unwrap_or(0)
    };
    let (names, subjects) = (width(|l| l.layer.as_str()), width(|l| &l.subject));
    for layer in &guest.layers {
        let why = match layer.verdict {
            Judgement::Holds | Judgement::Unknown => String::new(),
            Judgement::Finding => "  <- finding".to_owned(),
            Judgement::Blocked => format!("  (blocked by {})", places(&layer.blocked_by)),
        };
        let text = line(&format!("{}: {}", layer.reason, layer.evidence));
        let subject = line(&layer.subject);
        lines.push(format!(
            "  {} {:<names$}  {subject:<subjects$}  {text}{why}",
            mark(layer.status),
            layer.layer
        ));
    }
    lines
}

fn places(places: &[Place]) -> String {
    let names: Vec<String> = places
        .iter()
        .map(|place| {
            let guest = place.guest.as_ref();
            let of = guest.map_or_else(String::new, |guest| format!(" of {guest}"));
            line(&format!(
                "{}{of}",
                format!("{} {}", place.layer, place.subject).trim_end()
            ))
        })
        .collect();
    names.join(", ")
}

fn told(number: usize, finding: &Finding) -> Vec<String> {
    let guest = finding
        .guest
        .as_ref()
        .map_or_else(String::new, |guest| format!("{guest}, "));
    let subject = format!("{} {}", finding.layer, finding.subject);
    let head = format!("{number}. {guest}{}: {}", subject.trim_end(), finding.code);
    let mut lines = vec![line(&head), line(&format!("   {}", finding.what))];
    for evidence in &finding.evidence {
        let text = format!(
            "   evidence      {}  ({}, {})",
            evidence.text,
            evidence.source,
            age(evidence.age_ms)
        );
        lines.push(line(&text));
    }
    let counter = &finding.counter_test;
    lines.push(line(&format!("   counter-test  {}", counter.run)));
    lines.push(line(&format!(
        "                 this diagnosis is wrong if {}",
        counter.wrong_if
    )));
    lines.push(line(&format!("   fix           {}", finding.fix)));
    lines.push(line(&format!("                 risk: {}", finding.risk)));
    lines
}

/// How long ago, in the unit that fits.
fn age(ms: u64) -> String {
    match ms {
        0..=999 => "just now".to_owned(),
        1_000..=119_999 => format!("{} s ago", ms / 1_000),
        120_000..=7_199_999 => format!("{} min ago", ms / 60_000),
        _ => format!("{} h ago", ms / 3_600_000),
    }
}

/// Foreign text on one line.
fn line(text: &str) -> String {
    escaped(text).replace(['\n', '\t'], " ")
}

#[cfg(test)]
mod tests {
    use sovereign_protocol::condition::Layer;

    use super::super::diagnose;
    use super::super::examples::{healthy, set, with_status};
    use super::*;

    #[test]
    fn a_healthy_guest_is_told_in_one_line_per_layer() {
        let text = picture(&diagnose(&healthy()));
        assert!(text.ends_with("\n\nno finding"), "{text}");
        assert!(
            text.contains("✓ sql  Running\n  ✓ vmm        vmm       Running: vmm was seen\n"),
            "{text}"
        );
    }

    #[test]
    fn a_finding_has_its_evidence_counter_test_and_fix_and_hostile_text_stays_on_its_line() {
        let facts = with_status(|guest| {
            set(guest, Layer::Disk, Status::False, "Foreign", "\x1b[2J\n1. forged");
            set(guest, Layer::Service, Status::False, "DiskMissing", "not started");
        });
        let text = picture(&diagnose(&facts));
        let findings = text.split_once("\n\n1 finding\n\n").expect(&text).1;
        let expected = "\
1. sql, disk data: Foreign
   The data disk of sql holds something that is not ours; it is never formatted, and nothing is started on it.
   evidence      \\x1b[2J 1. forged  (guest agent, 1 s ago)
   evidence      the host's file has 512 MiB, of which 40 MiB are used  (data disk, just now)
   counter-test  blkid -p /var/lib/sovereign/default/guests/sql/data.img
                 this diagnosis is wrong if it names an ext4 file system with the label sovereign-data
   fix           sovereign --instance default down && mv /var/lib/sovereign/default/guests/sql/data.img /var/lib/sovereign/default/guests/sql/data.img.aside && sovereign --instance default up
                 risk: the guest starts with an empty data disk; what was there stays in the file that is set aside";
        assert_eq!(findings, expected);
        assert!(
            text.contains("✗ service    postgres  DiskMissing: not started  (blocked by disk data)\n"),
            "{text}"
        );
    }

    #[test]
    fn ages_are_told_in_the_unit_that_fits() {
        let ages = [3, 1_500, 119_999, 120_000, 7_200_000].map(age);
        assert_eq!(ages, ["just now", "1 s ago", "119 s ago", "2 min ago", "2 h ago"]);
    }
}
