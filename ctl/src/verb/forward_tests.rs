use sovereign_protocol::spec::Image;

use super::*;
use crate::fake_host::FakeHost;

/// A guest with PostgreSQL, and nothing that leads to it.
const GUEST: &str = "[guest.sql] # mine\n[guest.sql.service.postgres]\nkind = \"postgres\" # a service\n";

/// A directory with the configuration of `init`, its context, and a host agent that has applied it.
struct Scene {
    dir: tempfile::TempDir,
    context: Context,
    host: FakeHost,
}

fn image() -> Image {
    Image {
        kernel: "k".into(),
        initramfs: "i".into(),
        root: "r".into(),
        agent: "a".into(),
        digest: "d".into(),
    }
}

fn written_down(dir: &tempfile::TempDir) -> Context {
    std::fs::write(dir.path().join(config::FILE), config::template()).unwrap();
    Context::in_dir(dir.path())
}

fn scene() -> Scene {
    scene_of(tempfile::tempdir().unwrap(), None)
}

/// With `network` as its table of that name.
fn scene_of(dir: tempfile::TempDir, network: Option<&str>) -> Scene {
    let context = written_down(&dir);
    if let Some(network) = network {
        let text = format!("# where guests are\n[network] # this table\n{network}\n{GUEST}");
        std::fs::write(dir.path().join(config::FILE), text).unwrap();
    }
    let spec = config::load(&context).unwrap().host_spec(&image().into(), None);
    let host = FakeHost::start(&context.layout, spec);
    Scene { dir, context, host }
}

fn asked(mapping: &str, temporary: bool) -> AddForward {
    AddForward {
        guest: Name::parse("sql").unwrap(),
        mapping: mapping.parse().unwrap(),
        via: None,
        udp: false,
        name: None,
        temporary,
    }
}

/// As [`asked`], of the kernel.
fn translated(mapping: &str, udp: bool) -> AddForward {
    AddForward {
        via: Some(Via::Kernel),
        udp,
        ..asked(mapping, false)
    }
}

fn unasked(which: &str, temporary: bool) -> RemoveForward {
    RemoveForward {
        guest: Name::parse("sql").unwrap(),
        which: which.to_owned(),
        temporary,
    }
}

impl Scene {
    fn file(&self) -> String {
        std::fs::read_to_string(self.dir.path().join(config::FILE)).unwrap()
    }

    /// The listening addresses that the agent is asked for.
    fn applied(&self) -> Vec<String> {
        let state = self.host.state();
        let guests = state.spec.as_ref().unwrap().guests.values();
        guests
            .flat_map(|guest| guest.forwards.iter().map(|forward| forward.listen.to_string()))
            .collect()
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_forward_is_opened_and_written_once_and_taken_out_again() {
    let scene = scene();
    add(&scene.context, &asked("15433:5432", false)).await.unwrap();
    assert_eq!(scene.applied(), ["127.0.0.1:15432", "127.0.0.1:15433"]);
    let file = scene.file();
    assert!(
        file.contains("name = \"postgres-15433\"\nservice = \"postgres\"\n"),
        "{file}"
    );
    let template = config::template();
    let mut rest = file.lines();
    let kept = { template.lines() }.all(|line| rest.any(|found| found == line));
    assert!(kept, "comments and all, in their order: {file}");

    add(&scene.context, &asked("15433", false)).await.unwrap();
    assert_eq!(
        (scene.file(), scene.host.state().applied),
        (file, 1),
        "again changes nothing"
    );

    remove(&scene.context, &unasked("15433", false)).await.unwrap();
    assert_eq!(scene.applied(), ["127.0.0.1:15432"]);
    assert_eq!(scene.file(), config::template());
    remove(&scene.context, &unasked("15433", false)).await.unwrap();
    assert_eq!(scene.host.state().applied, 2, "again changes nothing");
}

#[tokio::test(flavor = "current_thread")]
async fn a_port_of_somebody_else_changes_neither_agent_nor_file() {
    let scene = scene();
    scene.host.state().foreign = Some(15433);
    let error = add(&scene.context, &asked("15433", false)).await.unwrap_err();
    assert_eq!(
        (error.kind, error.reason.as_str(), error.layer.as_deref()),
        (Kind::Refused, "PortUnavailable", Some("forward"))
    );
    assert!(
        error.human().contains("cannot be opened: seen"),
        "{}",
        error.human()
    );
    assert_eq!(scene.applied(), ["127.0.0.1:15432"], "taken back");
    assert_eq!(scene.file(), config::template());
}

#[tokio::test(flavor = "current_thread")]
async fn a_temporary_one_is_the_agents_only_and_the_list_says_so() {
    let scene = scene();
    add(&scene.context, &asked("15433", true)).await.unwrap();
    assert_eq!(scene.applied(), ["127.0.0.1:15432", "127.0.0.1:15433"]);
    assert_eq!(scene.file(), config::template());

    let settings = config::load(&scene.context).unwrap();
    let live = Live::find(&scene.context).await.unwrap();
    let running: Vec<Known> = live.forwards().collect();
    let origins = |running: &[Known]| -> Vec<(String, &str)> {
        let lines = lines(&written(&settings), running, None).into_iter();
        lines.map(|line| (line.listen, line.origin)).collect()
    };
    let own = ("127.0.0.1:15432".to_owned(), "file");
    assert_eq!(
        origins(&running),
        [own.clone(), ("127.0.0.1:15433".to_owned(), "temporary")]
    );
    assert_eq!(origins(&[]), [(own.0, "unapplied")]);

    // Kept on second thoughts: only the file changes.
    add(&scene.context, &asked("15433", false)).await.unwrap();
    assert!(scene.file().contains("15433") && scene.host.state().applied == 1);

    remove(&scene.context, &unasked("15433", true)).await.unwrap();
    assert_eq!(scene.applied(), ["127.0.0.1:15432"]);
    assert!(scene.file().contains("15433"), "temporary: the file stays");
}

#[tokio::test(flavor = "current_thread")]
async fn one_that_the_file_moved_is_moved_not_doubled() {
    let scene = scene();
    let moved = config::template().replace("15432", "15440");
    std::fs::write(scene.dir.path().join(config::FILE), &moved).unwrap();
    add(&scene.context, &asked("15440", false)).await.unwrap();
    assert_eq!(
        (scene.applied(), scene.file()),
        (vec!["127.0.0.1:15440".to_owned()], moved)
    );
}

#[tokio::test(flavor = "current_thread")]
async fn without_an_agent_only_the_file_changes_and_nothing_is_temporary() {
    let dir = tempfile::tempdir().unwrap();
    let context = written_down(&dir);
    let error = add(&context, &asked("15433", true)).await.unwrap_err();
    assert_eq!(
        (error.kind, error.reason.as_str()),
        (Kind::Unreachable, "NotRunning")
    );
    add(&context, &asked("15433", false)).await.unwrap();
    let settings = config::load(&context).unwrap();
    assert_eq!(written(&settings).len(), 2);
    assert!(!dir.path().join("state").exists());
}

#[tokio::test(flavor = "current_thread")]
async fn forwards_of_the_kernel_are_opened_written_listed_and_taken_out() {
    let scene = scene_of(tempfile::tempdir().unwrap(), Some("namespace = \"host\"\n"));
    let before = scene.file();
    add(&scene.context, &translated("0.0.0.0:15433", false))
        .await
        .unwrap();
    let range = AddForward {
        name: Some(Name::parse("range").unwrap()),
        ..translated("0.0.0.0:8000-8010", true)
    };
    add(&scene.context, &range).await.unwrap();
    let file = scene.file();
    for lines in [
        "listen = \"0.0.0.0:15433\"\nport = 5432\nvia = \"kernel\"\nprotocol = \"tcp\"\n",
        "name = \"range\"\nservice = \"postgres\"\nlisten = \"0.0.0.0:8000-8010\"\nport = 5432\nvia = \"kernel\"\nprotocol = \"udp\"\n",
    ] {
        assert!(file.contains(lines), "{file}");
    }
    assert!(file.starts_with(&before), "comments and all: {file}");

    let settings = config::load(&scene.context).unwrap();
    let live = Live::find(&scene.context).await.unwrap();
    let running: Vec<Known> = live.forwards().collect();
    assert_eq!(running, written(&settings), "the agent has what the file says");
    let report = live.link.as_ref().unwrap().status().await.unwrap();
    let shown: Vec<String> = lines(&written(&settings), &running, Some(&report))
        .iter()
        .map(shown)
        .collect();
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(
        words(&shown[0]),
        [
            "sql",
            "postgres",
            "0.0.0.0:15433",
            "sql:5432",
            "kernel/tcp",
            "listens"
        ]
    );
    assert_eq!(
        words(&shown[1]),
        [
            "sql",
            "range",
            "0.0.0.0:8000-8010",
            "sql:5432-5442",
            "kernel/udp",
            "listens"
        ]
    );

    add(&scene.context, &range).await.unwrap();
    assert_eq!(
        (scene.file(), scene.host.state().applied),
        (file, 2),
        "again changes nothing"
    );
    remove(&scene.context, &unasked("8000-8010/tcp", false))
        .await
        .unwrap();
    assert_eq!(scene.host.state().applied, 2, "there is no such forward");
    remove(&scene.context, &unasked("8000-8010/udp", false))
        .await
        .unwrap();
    remove(&scene.context, &unasked("15433", false)).await.unwrap();
    assert_eq!(scene.file(), before);
    assert!(scene.applied().is_empty());
}

#[tokio::test(flavor = "current_thread")]
async fn what_the_network_cannot_do_is_refused_before_anything_changes() {
    for network in ["namespace = \"private\"\n", "namespace = \"none\"\n"] {
        let scene = scene_of(tempfile::tempdir().unwrap(), Some(network));
        let before = scene.file();
        let asked = translated("0.0.0.0:15433", false);
        let error = add(&scene.context, &asked).await.unwrap_err();
        assert_eq!(
            (error.kind, error.reason.as_str()),
            (Kind::Configuration, "NotPossible")
        );
        let text = error.human();
        assert!(text.contains("only from network namespace \"host\""), "{text}");
        assert!(
            text.contains("next: set namespace = \"host\" under [network]"),
            "{text}"
        );
        assert_eq!((scene.file(), scene.host.state().applied), (before, 0));
    }
}

#[tokio::test(flavor = "current_thread")]
async fn one_that_the_kernel_cannot_make_is_told_and_taken_back() {
    let scene = scene_of(tempfile::tempdir().unwrap(), Some("namespace = \"host\"\n"));
    let before = scene.file();
    scene.host.state().untranslated = true;
    let asked = translated("0.0.0.0:15433", false);
    let error = add(&scene.context, &asked).await.unwrap_err();
    assert_eq!(
        (error.kind, error.reason.as_str(), error.layer.as_deref()),
        (Kind::Refused, "NotTranslated", Some("forward"))
    );
    assert!(
        error.human().contains("next: sovereign doctor"),
        "{}",
        error.human()
    );
    assert_eq!(scene.file(), before);
    assert!(scene.applied().is_empty(), "taken back");
}
