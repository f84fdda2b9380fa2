use super::*;
use crate::config;
use crate::fake_host::FakeHost;
use sovereign_protocol::spec::Image;

fn started(context: &Context) -> FakeHost {
    let image = Image {
        kernel: "k".into(),
        initramfs: "i".into(),
        root: "r".into(),
        agent: "a".into(),
        digest: "d".into(),
    };
    let settings = config::parse(Path::new("s.toml"), &config::template()).unwrap();
    FakeHost::start(&context.layout, settings.host_spec(&image.clone().into(), None))
}

#[tokio::test(flavor = "current_thread")]
async fn the_running_agent_is_told_with_process_version_start_and_network() {
    let dir = tempfile::tempdir().unwrap();
    let context = Context::in_dir(dir.path());
    let host = started(&context);
    host.state().no_network = Some("namespace none (auto): unshare: EPERM".into());
    let report = look(&context).await.unwrap();
    assert_eq!(
        report.pid,
        i32::try_from(std::process::id()).ok(),
        "the fake is this process"
    );
    assert_eq!(report.version.as_deref(), Some(env!("CARGO_PKG_VERSION")));
    let since = humantime::parse_rfc3339(report.since.as_ref().unwrap()).unwrap();
    assert!(
        SystemTime::now().duration_since(since).unwrap().as_secs() < 3600,
        "{report:?}"
    );
    assert_eq!(
        (report.network, report.guests.as_slice()),
        (Some("none"), ["sql".to_owned()].as_slice())
    );
    let shown = picture(&report, "host agent 0.1.0 runs as pid 7");
    let expected = format!(
        "host agent 0.1.0 runs as pid 7, since {}\n  guests   sql\n  network  none (namespace none (auto): unshare: EPERM)\n",
        report.since.as_ref().unwrap()
    );
    assert!(shown.starts_with(&expected), "{shown}");
    assert!(
        shown.ends_with("  at boot  not installed (`sovereign host install`)"),
        "{shown}"
    );
    host.state().no_network = None;
    assert_eq!(look(&context).await.unwrap().network, Some("private"));
}

#[test]
fn only_where_systemd_runs_and_keeps_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut context = Context::in_dir(dir.path());
    let refused = |context: &Context| {
        let error = may_install(context).unwrap_err();
        assert_eq!(error.kind, Kind::Refused);
        error.reason
    };
    assert_eq!(refused(&context), "NoSystemd");
    context.environment.systemd = true;
    assert_eq!(refused(&context), "NoLingering");
    context.environment.root = true;
    assert!(may_install(&context).is_ok());
    context.environment.root = false;
    context.environment.lingers = true;
    assert!(may_install(&context).is_ok());
}

#[test]
fn the_unit_is_written_once_with_the_directory_that_systemd_logs_to() {
    let dir = tempfile::tempdir().unwrap();
    let context = Context::in_dir(dir.path());
    let path = dir.path().join("units/x.service");
    assert!(write(&path, "one", &context.layout).unwrap());
    assert!(!write(&path, "one", &context.layout).unwrap());
    assert!(write(&path, "two", &context.layout).unwrap());
    assert_eq!(fs::read_to_string(&path).unwrap(), "two");
    assert!(context.layout.state.is_dir());
    assert_eq!(fs::read_dir(dir.path().join("units")).unwrap().count(), 1);
}
