//! The systemd unit of an instance: its text, its place, and what is said to systemctl. Pure.
//!
//! Guests outlive their host agent, so the unit ends the agent alone (`KillMode=process`); an agent that ended by
//! SIGTERM was meant to, so only a failure is a reason to start it again.

use std::path::{Path, PathBuf};

use sovereign_protocol::layout::Layout;

use crate::place::Environment;

/// The unit's name.
pub(crate) fn name(layout: &Layout) -> String {
    format!("sovereign-{}.service", layout.instance)
}

/// Where the unit's file is, or would be; `None` when the user's configuration directory is unknown.
pub(crate) fn path(environment: &Environment, layout: &Layout) -> Option<PathBuf> {
    Some(environment.unit_home.as_ref()?.join(name(layout)))
}

/// True when the host agent of this instance is systemd's to start.
pub(crate) fn is_installed(environment: &Environment, layout: &Layout) -> bool {
    environment.systemd && path(environment, layout).is_some_and(|path| path.is_file())
}

/// The unit's text.
pub(crate) fn text(environment: &Environment, layout: &Layout, host: &Path) -> String {
    let argv = [
        host.as_os_str(),
        "run".as_ref(),
        "--instance".as_ref(),
        layout.instance.as_str().as_ref(),
        "--run-dir".as_ref(),
        layout.run.as_os_str(),
        "--state-dir".as_ref(),
        layout.state.as_os_str(),
    ];
    let command: Vec<String> = argv
        .iter()
        .map(|word| quoted(&word.to_string_lossy(), true))
        .collect();
    let log = specifiers(&layout.log().to_string_lossy());
    let state = quoted(&layout.state.to_string_lossy(), false);
    let wanted_by = if environment.root {
        "multi-user.target"
    } else {
        "default.target"
    };
    format!(
        "# Written by `sovereign host install`; written anew by running it again.\n\
         [Unit]\n\
         Description=sovereign host agent, instance {instance}\n\
         RequiresMountsFor={state}\n\
         \n\
         [Service]\n\
         Type=exec\n\
         ExecStart={command}\n\
         # Guests run on when the agent ends, and the next one adopts them.\n\
         KillMode=process\n\
         Restart=on-failure\n\
         RestartSec=1\n\
         UMask=0077\n\
         StandardOutput=append:{log}\n\
         StandardError=append:{log}\n\
         \n\
         [Install]\n\
         WantedBy={wanted_by}\n",
        instance = layout.instance,
        command = command.join(" "),
    )
}

/// A command to systemctl, of the user's own manager unless it is root's.
pub(crate) fn systemctl(environment: &Environment, words: &[&str]) -> Vec<String> {
    let user = (!environment.root).then_some("--user");
    let all = ["systemctl"].into_iter().chain(user).chain(words.iter().copied());
    all.map(str::to_owned).collect()
}

/// systemd.syntax(7): one word, whatever is in it. A command line also expands variables (systemd.service(5)).
fn quoted(word: &str, in_command: bool) -> String {
    let escaped = specifiers(word).replace('\\', "\\\\").replace('"', "\\\"");
    let escaped = if in_command {
        escaped.replace('$', "$$")
    } else {
        escaped
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=%:@".contains(c);
    if !escaped.is_empty() && escaped.chars().all(plain) {
        return escaped;
    }
    format!("\"{escaped}\"")
}

/// `%` begins a specifier (systemd.unit(5)).
fn specifiers(text: &str) -> String {
    text.replace('%', "%%")
}

#[cfg(test)]
mod tests {
    use super::*;
    use sovereign_protocol::name::Name;

    fn layout(state: &str) -> Layout {
        Layout {
            instance: Name::parse("default").unwrap(),
            run: "/run/sovereign/default".into(),
            state: state.into(),
        }
    }

    fn environment(root: bool) -> Environment {
        Environment {
            root,
            systemd: true,
            unit_home: Some("/u".into()),
            ..Environment::default()
        }
    }

    #[test]
    fn the_whole_unit() {
        let text = text(
            &environment(true),
            &layout("/var/lib/sovereign/default"),
            Path::new("/opt/s/sovereign-host"),
        );
        let expected = "\
# Written by `sovereign host install`; written anew by running it again.
[Unit]
Description=sovereign host agent, instance default
RequiresMountsFor=/var/lib/sovereign/default

[Service]
Type=exec
ExecStart=/opt/s/sovereign-host run --instance default --run-dir /run/sovereign/default --state-dir /var/lib/sovereign/default
# Guests run on when the agent ends, and the next one adopts them.
KillMode=process
Restart=on-failure
RestartSec=1
UMask=0077
StandardOutput=append:/var/lib/sovereign/default/host.log
StandardError=append:/var/lib/sovereign/default/host.log

[Install]
WantedBy=multi-user.target
";
        assert_eq!(text, expected);
    }

    #[test]
    fn odd_paths_are_one_word_and_a_users_unit_is_the_users() {
        let text = text(
            &environment(false),
            &layout("/home/a b/100%/$x\"y"),
            Path::new("/h"),
        );
        assert!(
            text.contains("--state-dir \"/home/a b/100%%/$$x\\\"y\"\n"),
            "{text}"
        );
        assert!(
            text.contains("RequiresMountsFor=\"/home/a b/100%%/$x\\\"y\"\n"),
            "{text}"
        );
        assert!(text.contains("append:/home/a b/100%%/$x\"y/host.log\n"), "{text}");
        assert!(text.ends_with("WantedBy=default.target\n"));
        assert_eq!(
            systemctl(&environment(false), &["start", "x"]),
            ["systemctl", "--user", "start", "x"]
        );
        assert_eq!(
            systemctl(&environment(true), &["start", "x"]),
            ["systemctl", "start", "x"]
        );
    }

    #[test]
    fn installed_is_a_file_and_a_systemd_that_runs() {
        let dir = tempfile::tempdir().unwrap();
        let mut environment = environment(true);
        environment.unit_home = Some(dir.path().to_owned());
        assert!(!is_installed(&environment, &layout("/s")));
        std::fs::write(dir.path().join("sovereign-default.service"), "").unwrap();
        assert!(is_installed(&environment, &layout("/s")));
        environment.systemd = false;
        assert!(!is_installed(&environment, &layout("/s")));
    }

    /// systemd's own reader, where it is there; it reads files and asks nobody.
    #[test]
    fn systemd_takes_the_unit() {
        let dir = tempfile::tempdir().unwrap();
        let host = dir.path().join("sovereign host");
        std::fs::write(&host, "#!/bin/sh\n").unwrap();
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&host, std::fs::Permissions::from_mode(0o755)).unwrap();
        let verify = |name: &str, text: &str| {
            let file = dir.path().join(name);
            std::fs::write(&file, text).unwrap();
            let arguments = ["verify", "--man=no", "--recursive-errors=no"];
            std::process::Command::new("systemd-analyze")
                .args(arguments)
                .arg(&file)
                .output()
        };
        let unit = text(&environment(true), &layout("/var/lib/a b/default"), &host);
        let Ok(output) = verify("sovereign-default.service", &unit) else {
            eprintln!("SKIPPED: no systemd-analyze here, so systemd does not read the unit");
            return;
        };
        let said = |output: &std::process::Output| String::from_utf8_lossy(&output.stderr).into_owned();
        let wrong = verify(
            "sovereign-wrong.service",
            &unit.replace("KillMode=process", "KillMode=nonsense"),
        );
        if !said(&wrong.unwrap()).contains("nonsense") {
            eprintln!(
                "SKIPPED: systemd-analyze cannot read units here: {}",
                said(&output)
            );
            return;
        }
        let about_it = said(&output);
        let about_it: Vec<&str> = about_it
            .lines()
            .filter(|line| line.contains("sovereign-default"))
            .collect();
        assert_eq!(about_it, [""; 0]);
    }
}
