//! The users of the image, read from its passwd file (a static glibc has no NSS).

/// A user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Its name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Home directory.
    pub home: String,
}

/// Finds a user in the text of a passwd file.
#[must_use]
pub fn find(passwd: &str, name: &str) -> Option<User> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [found, _, uid, gid, _, home, ..] = fields[..] else {
            return None;
        };
        (found == name).then_some(())?;
        Some(User {
            name: found.to_owned(),
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
            home: home.to_owned(),
        })
    })
}

/// Finds a user of this system.
///
/// # Errors
/// The system's own, or `NotFound` with the name.
pub fn lookup(name: &str) -> std::io::Result<User> {
    find(&std::fs::read_to_string("/etc/passwd")?, name).ok_or_else(|| {
        std::io::Error::new(
            std::io::ErrorKind::NotFound,
            format!("/etc/passwd has no user {name:?}"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_their_whole_name() {
        let passwd =
            "root:x:0:0:root:/root:/bin/sh\nbroken:x\npostgres:x:999:998::/var/lib/postgresql:/bin/sh\n";
        let user = find(passwd, "postgres").unwrap();
        assert_eq!(
            (user.uid, user.gid, user.home.as_str()),
            (999, 998, "/var/lib/postgresql")
        );
        assert!(find(passwd, "post").is_none());
        assert!(find(passwd, "broken").is_none());
    }
}
