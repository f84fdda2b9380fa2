//! Recipes: which packages make an image, what is dropped from them, and what maintainer scripts would have done.

use crate::{
    Arch,
    tree::{Tree, TreeError},
};

/// Counted up whenever the same lock should give another image.
pub(crate) const RECIPE_VERSION: u32 = 1;

/// A recipe.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Recipe {
    pub(crate) name: &'static str,
    /// Code name of the release.
    pub(crate) suite: &'static str,
    list: &'static str,
    /// The line of etc/passwd and that of etc/group for the user of its service.
    user: (&'static str, &'static str),
    /// The directory that init binds to the data disk, if its service keeps anything.
    data: Option<&'static str>,
}

const RECIPES: &[Recipe] = &[
    Recipe {
        name: "postgresql-17",
        suite: "trixie",
        list: include_str!("../recipes/postgresql-17.packages"),
        user: (
            "postgres:x:999:999:PostgreSQL:/var/lib/postgresql:/bin/sh",
            "postgres:x:999:",
        ),
        data: Some("var/lib/postgresql"),
    },
    Recipe {
        name: "miniflux",
        suite: "trixie",
        list: include_str!("../recipes/miniflux.packages"),
        user: (
            "miniflux:x:998:998:Miniflux:/nonexistent:/usr/sbin/nologin",
            "miniflux:x:998:",
        ),
        data: None,
    },
];

/// Certificates of authorities, one file each.
const AUTHORITIES: &str = "usr/share/ca-certificates/";
/// All of them in one file, as ca-certificates' script makes it.
const BUNDLE: &str = "etc/ssl/certs/ca-certificates.crt";

/// Path prefixes that a guest never reads.
const DROPPED: &[&str] = &[
    "etc/apparmor.d/",
    "etc/cron.daily/",
    "etc/init.d/",
    "etc/logrotate.d/",
    "usr/lib/init/",
    "usr/lib/systemd/",
    "usr/lib/udev/",
    "usr/share/bash-completion/",
    "usr/share/bug/",
    "usr/share/doc/",
    "usr/share/doc-base/",
    "usr/share/info/",
    "usr/share/initramfs-tools/",
    "usr/share/lintian/",
    "usr/share/locale/",
    "usr/share/man/",
    "usr/share/perl",
    "usr/share/postgresql-common/",
    "usr/lib/postgresql/17/lib/bitcode/",
    "usr/lib/postgresql/17/lib/pgxs/",
    "usr/lib/postgresql/17/lib/llvmjit",
];

/// Links into what the agent writes at boot.
const RUN_TIME_FILES: &[&str] = &["resolv.conf", "hostname", "hosts", "machine-id"];

/// Directories that must exist: path, permissions.
const DIRECTORIES: &[(&str, u32)] = &[
    ("dev", 0o755),
    ("etc", 0o755),
    ("mnt", 0o755),
    ("opt/sovereign", 0o755),
    ("proc", 0o755),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("usr/bin", 0o755),
    ("usr/sbin", 0o755),
    ("var/log", 0o755),
    ("var/tmp", 0o1777),
];

const NSSWITCH: &str =
    "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nnetworks: files\nservices: files\n";

/// Applets that get a name, where no package brought a program of that name.
const APPLETS: &[&str] = &[
    "[",
    "ash",
    "awk",
    "basename",
    "cat",
    "chgrp",
    "chmod",
    "chown",
    "clear",
    "cp",
    "cut",
    "date",
    "dd",
    "df",
    "dirname",
    "dmesg",
    "du",
    "echo",
    "env",
    "expr",
    "false",
    "find",
    "free",
    "grep",
    "gunzip",
    "gzip",
    "head",
    "hostname",
    "id",
    "kill",
    "less",
    "ln",
    "ls",
    "md5sum",
    "mkdir",
    "mknod",
    "mktemp",
    "more",
    "mount",
    "mv",
    "nc",
    "nslookup",
    "od",
    "pgrep",
    "pidof",
    "ping",
    "printenv",
    "printf",
    "ps",
    "pwd",
    "readlink",
    "realpath",
    "rm",
    "rmdir",
    "sed",
    "seq",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "stty",
    "sync",
    "tail",
    "tar",
    "tee",
    "test",
    "time",
    "timeout",
    "top",
    "touch",
    "tr",
    "true",
    "tty",
    "umount",
    "uname",
    "uniq",
    "uptime",
    "vi",
    "wc",
    "wget",
    "which",
    "whoami",
    "xargs",
    "yes",
    "zcat",
];
/// The same for `usr/sbin`.
const ADMIN_APPLETS: &[&str] = &[
    "arp", "blkid", "chroot", "ifconfig", "ip", "losetup", "nologin", "route", "sysctl",
];

impl Recipe {
    pub(crate) fn named(name: &str) -> Option<Self> {
        RECIPES.iter().find(|recipe| recipe.name == name).copied()
    }

    /// Names of all recipes.
    pub(crate) fn names() -> impl Iterator<Item = &'static str> {
        RECIPES.iter().map(|recipe| recipe.name)
    }

    pub(crate) fn packages(&self) -> impl Iterator<Item = &'static str> + use<> {
        self.list
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
    }

    /// Turns the merged packages into a root: drops what is not needed and adds what scripts would have made.
    pub(crate) fn finish(&self, tree: &mut Tree, arch: Arch) -> Result<(), TreeError> {
        tree.prune(is_dropped);
        // Modules come with the kernel on the agent disk; a package may have made the directory for its helpers.
        tree.prune(|path| path == "usr/lib/modules" || path.starts_with("usr/lib/modules/"));
        for (path, mode) in DIRECTORIES {
            tree.directory(path, *mode)?;
        }
        merge_usr(tree, arch)?;
        if let Some(path) = self.data {
            tree.directory(path, 0o755)?;
        }
        let (user, group) = self.user;
        let passwd = format!(
            "root:x:0:0:root:/root:/bin/sh\n{user}\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
        );
        let group = format!("root:x:0:\ntty:x:5:\n{group}\nnogroup:x:65534:\n");
        let files = [
            ("etc/passwd", passwd.as_str()),
            ("etc/group", &group),
            ("etc/nsswitch.conf", NSSWITCH),
        ];
        for (path, text) in files {
            tree.file(path, 0o644, text.as_bytes())?;
        }
        bundle_authorities(tree)?;
        for name in RUN_TIME_FILES {
            tree.link(&format!("etc/{name}"), &format!("/run/sovereign/etc/{name}"))?;
        }
        tree.link("etc/mtab", "/proc/self/mounts")?;
        tree.link("usr/lib/modules", "/opt/sovereign/modules")?;
        add_applets(tree)
    }
}

fn is_dropped(path: &str) -> bool {
    // Transforms for perl and python load interpreters that are not here; static archives and headers build nothing.
    let is_transform = path.starts_with("usr/lib/postgresql/17/lib/")
        && (path.contains("plperl") || path.contains("plpython"));
    // Character set converters of glibc: PostgreSQL brings its own, the guest is UTF-8.
    let is_converter = path.starts_with("usr/lib/") && path.contains("/gconv");
    let in_perl = path.starts_with("usr/lib/")
        && path
            .split('/')
            .any(|part| part == "perl" || part == "perl5" || part == "perl-base");
    let below = |prefix: &str| path.starts_with(prefix) || prefix.strip_suffix('/') == Some(path);
    is_transform
        || is_converter
        || in_perl
        || path.ends_with(".a")
        || DROPPED.iter().any(|prefix| below(prefix))
}

/// `/bin` and its like are links into `/usr`; base-files brings most of them.
fn merge_usr(tree: &mut Tree, arch: Arch) -> Result<(), TreeError> {
    let lib64 = (arch == Arch::Amd64).then_some("lib64");
    for name in ["bin", "sbin", "lib"].into_iter().chain(lib64) {
        tree.directory(&format!("usr/{name}"), 0o755)?;
        tree.link(name, &format!("usr/{name}"))?;
    }
    for (name, target) in [("var/run", "/run"), ("var/lock", "/run/lock")] {
        tree.prune(|path| path == name || path.starts_with(&format!("{name}/")));
        tree.link(name, target)?;
    }
    Ok(())
}

/// Programs look for one file with all authorities; where no package brought any there is none.
fn bundle_authorities(tree: &mut Tree) -> Result<(), TreeError> {
    let mut bundle = Vec::new();
    for (path, _) in tree.iter().filter(|(path, _)| path.starts_with(AUTHORITIES)) {
        if let Some(content) = tree.content(path) {
            bundle.extend_from_slice(content);
        }
    }
    tree.prune(|path| path.starts_with(AUTHORITIES));
    match bundle.is_empty() {
        true => Ok(()),
        false => tree.file(BUNDLE, 0o644, bundle),
    }
}

fn add_applets(tree: &mut Tree) -> Result<(), TreeError> {
    let all = APPLETS.iter().map(|name| ("usr/bin", *name, "busybox"));
    let admin = ADMIN_APPLETS
        .iter()
        .map(|name| ("usr/sbin", *name, "../bin/busybox"));
    for (directory, name, target) in all.chain(admin) {
        let taken = ["usr/bin", "usr/sbin"]
            .iter()
            .any(|place| tree.get(&format!("{place}/{name}")).is_some());
        if !taken {
            tree.link(&format!("{directory}/{name}"), target)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Node;

    fn finished() -> Tree {
        let mut tree = Tree::default();
        tree.file("usr/bin/busybox", 0o755, *b"x").unwrap();
        tree.file("usr/bin/sed", 0o755, *b"GNU").unwrap();
        tree.file("usr/share/doc/a/copyright", 0o644, *b"x").unwrap();
        tree.file("usr/lib/postgresql/17/lib/llvmjit.so", 0o644, *b"x")
            .unwrap();
        tree.file("usr/lib/postgresql/17/lib/hstore_plperl.so", 0o644, *b"x")
            .unwrap();
        tree.link("bin", "usr/bin").unwrap();
        tree.directory("var/run", 0o755).unwrap();
        Recipe::named("postgresql-17")
            .unwrap()
            .finish(&mut tree, Arch::Amd64)
            .unwrap();
        tree
    }

    #[test]
    fn a_root_has_shell_users_links_and_mount_points() {
        let tree = finished();
        assert_eq!(tree.resolve("bin/sh").as_deref(), Some("usr/bin/busybox"));
        assert_eq!(tree.resolve("sbin/ip").as_deref(), Some("usr/bin/busybox"));
        assert_eq!(
            tree.content("usr/bin/sed"),
            Some(b"GNU".as_slice()),
            "a package's program stays"
        );
        assert!(String::from_utf8_lossy(tree.content("etc/passwd").unwrap()).contains("postgres:x:999:999:"));
        let link = |path: &str, target: &str| {
            assert_eq!(
                tree.get(path),
                Some(&Node::Link {
                    target: target.to_owned()
                })
            )
        };
        link("etc/resolv.conf", "/run/sovereign/etc/resolv.conf");
        link("usr/lib/modules", "/opt/sovereign/modules");
        link("var/run", "/run");
        link("lib64", "usr/lib64");
        for (path, mode) in DIRECTORIES {
            assert_eq!(tree.get(path), Some(&Node::Directory { mode: *mode }), "{path}");
        }
    }

    #[test]
    fn documentation_bitcode_and_interpreters_are_dropped() {
        let tree = finished();
        assert!(tree.get("usr/share/doc").is_none());
        assert!(tree.get("usr/lib/postgresql").is_none());
    }

    #[test]
    fn each_recipe_has_its_own_user_and_only_what_keeps_data_has_a_place_for_it() {
        let mut tree = Tree::default();
        for (name, text) in [("b", "two\n"), ("a", "one\n")] {
            let path = format!("usr/share/ca-certificates/mozilla/{name}.crt");
            tree.file(&path, 0o644, text.as_bytes()).unwrap();
        }
        Recipe::named("miniflux")
            .unwrap()
            .finish(&mut tree, Arch::Amd64)
            .unwrap();
        let passwd = String::from_utf8_lossy(tree.content("etc/passwd").unwrap());
        assert!(
            passwd.contains("\nminiflux:x:998:998:") && !passwd.contains("postgres"),
            "{passwd}"
        );
        assert!(tree.get("var/lib/postgresql").is_none());
        assert_eq!(tree.content(BUNDLE), Some(b"one\ntwo\n".as_slice()));
        assert!(tree.get("usr/share/ca-certificates").is_none());
        let postgres = finished();
        assert!(postgres.get("var/lib/postgresql").is_some() && postgres.get(BUNDLE).is_none());
    }

    #[test]
    fn package_lists_are_sorted_and_free_of_repeats() {
        for name in Recipe::names() {
            let packages: Vec<_> = Recipe::named(name).unwrap().packages().collect();
            assert!(packages.is_sorted() && packages.windows(2).all(|pair| pair[0] != pair[1]));
        }
    }
}
