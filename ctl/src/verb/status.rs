//! `status`: what is true now; with no agent, what lies on disk.

use std::collections::BTreeSet;
use std::time::SystemTime;

use sovereign_protocol::condition::Status;
use sovereign_protocol::layout::Layout;
use sovereign_protocol::name::Name;
use sovereign_protocol::status::{GuestStatus, Phase, SCHEMA, StatusReport};

use crate::cli;
use crate::clock::rfc3339;
use crate::context::{Context, data, data_json, talk};
use crate::error::{CommandError, Kind};
use crate::link::Link;
use crate::picture::picture;
use crate::{config, progress, shims};

pub(super) async fn run(context: &Context, args: &cli::Status) -> Result<u8, CommandError> {
    let link = Link::connect_if_running(&context.layout).await?;
    let report = match &link {
        Some(link) => link.status().await?,
        None => at_rest(context),
    };
    if context.wants_data() {
        data_json(&report)?;
    } else if link.is_some() {
        data(&picture(&report))?;
    } else {
        let names: Vec<&str> = report.guests.iter().map(|guest| guest.name.as_str()).collect();
        data(&format!(
            "instance {}: {} (guests: {})",
            report.instance,
            unattended(&report),
            names.join(", ")
        ))?;
    }
    if link.is_none() {
        talk(&format!(
            "{}; next: {}",
            unattended(&report),
            context.spell("sovereign up")
        ));
    }
    let ready = !report.guests.is_empty() && report.guests.iter().all(progress::is_ready);
    Ok(if args.check && !ready {
        Kind::NotReached.exit_code()
    } else {
        0
    })
}

/// What is to be seen without a host agent: guests outlive one that was ended or killed.
fn unattended(report: &StatusReport) -> String {
    let runs = |guest: &&GuestStatus| guest.phase != Phase::Stopped;
    let names: Vec<&str> = report
        .guests
        .iter()
        .filter(runs)
        .map(|guest| guest.name.as_str())
        .collect();
    match names[..] {
        [] => "nothing running".to_owned(),
        _ => format!("no host agent, but guests run on: {}", names.join(", ")),
    }
}

/// Without an agent it is only seen whose shim answers; whether a guest is ready is unknown.
fn at_rest(context: &Context) -> StatusReport {
    let configured: Vec<Name> = config::load(context)
        .map(|settings| settings.guests.into_keys().collect())
        .unwrap_or_default();
    let since = rfc3339(SystemTime::now());
    let names = on_disk(&context.layout)
        .into_iter()
        .chain(configured)
        .collect::<BTreeSet<Name>>();
    let phase = |name: &Name| match shims::runs(&context.layout, name) {
        true => Phase::Running,
        false => Phase::Stopped,
    };
    let guests = names.into_iter().map(|name| GuestStatus {
        phase: phase(&name),
        name,
        ready: Status::Unknown,
        since: since.clone(),
        boot_id: None,
        spec_revision: 0,
        applied_revision: 0,
        vmm: None,
        conditions: Vec::new(),
        forwards: Vec::new(),
        requires: Vec::new(),
    });
    StatusReport {
        schema: SCHEMA.to_owned(),
        instance: context.layout.instance.clone(),
        revision: 0,
        guests: guests.collect(),
        network: Vec::new(),
    }
}

fn on_disk(layout: &Layout) -> BTreeSet<Name> {
    let Ok(entries) = std::fs::read_dir(layout.state.join("guests")) else {
        return BTreeSet::new();
    };
    entries
        .flatten()
        .filter_map(|entry| Name::parse(entry.file_name().to_str()?).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use sovereign_protocol::layout::SHIM_SOCKET;

    use super::*;
    use crate::picture::examples::{guest, report, with_network};
    use crate::schema::compare;

    #[test]
    fn a_guest_that_runs_without_a_host_agent_is_not_told_as_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let context = Context::in_dir(dir.path());
        let sql = Name::parse("sql").unwrap();
        std::fs::create_dir_all(context.layout.state.join("guests/sql")).unwrap();
        let run = context.layout.guest_run(&sql);
        std::fs::create_dir_all(&run).unwrap();
        let seen = || {
            let report = at_rest(&context);
            let guest = &report.guests[0];
            (guest.phase, guest.ready, unattended(&report))
        };
        assert_eq!(
            seen(),
            (Phase::Stopped, Status::Unknown, "nothing running".to_owned())
        );
        let _shim = std::os::unix::net::UnixListener::bind(run.join(SHIM_SOCKET)).unwrap();
        let told = "no host agent, but guests run on: sql".to_owned();
        assert_eq!(seen(), (Phase::Running, Status::Unknown, told));
    }

    #[test]
    fn the_report_and_its_schema_name_the_same_fields() {
        let schema: Value = serde_json::from_str(include_str!("../../../docs/status.schema.json")).unwrap();
        assert_eq!(
            schema["properties"]["schema"]["const"],
            sovereign_protocol::status::SCHEMA
        );
        let mut stopped = guest();
        stopped.vmm = None;
        stopped.boot_id = None;
        compare(
            &schema,
            &schema,
            &serde_json::to_value(with_network(report(vec![guest(), stopped]))).unwrap(),
            "$",
        );
    }

    #[test]
    fn the_schema_knows_every_layer_and_phase() {
        use sovereign_protocol::condition::Layer;
        use sovereign_protocol::status::Phase;
        let schema: Value = serde_json::from_str(include_str!("../../../docs/status.schema.json")).unwrap();
        let known = |name: &str| schema["$defs"][name]["enum"].as_array().unwrap().clone();
        let layers = [
            Layer::Vmm,
            Layer::Session,
            Layer::Kernel,
            Layer::Clock,
            Layer::Disk,
            Layer::Loopback,
            Layer::Interface,
            Layer::Tap,
            Layer::Routing,
            Layer::Nat,
            Layer::Service,
            Layer::Tailscale,
            Layer::Forward,
        ];
        assert_eq!(known("layer"), layers.map(|layer| Value::from(layer.as_str())));
        let phases = [
            Phase::Stopped,
            Phase::Starting,
            Phase::Running,
            Phase::Stopping,
            Phase::Failed,
            Phase::CrashLoop,
        ];
        assert_eq!(
            known("phase"),
            phases.map(|phase| serde_json::to_value(phase).unwrap())
        );
    }
}
