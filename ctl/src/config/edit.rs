//! Changes to the file as somebody wrote it: comments, order and spaces stay. Pure but for [`replace`].

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, chown};
use std::path::Path;

use sovereign_protocol::name::Name;
use sovereign_protocol::spec::Forward;
use toml_edit::{Array, ArrayOfTables, DocumentMut, InlineTable, Item, Table, TableLike, Value, value};

/// The text with one more forward of a guest; `None` when the file has a form that cannot be added to.
pub(crate) fn add_forward(text: &str, guest: &Name, forward: &Forward) -> Option<String> {
    let mut document: DocumentMut = text.parse().ok()?;
    let is_inline = document.get("guest")?.get(guest.as_str())?.is_inline_table();
    let table = guest_table(&mut document, guest)?;
    if !table.contains_key("forward") {
        let empty = match is_inline {
            true => value(Array::new()),
            false => Item::ArrayOfTables(ArrayOfTables::new()),
        };
        table.insert("forward", empty);
    }
    match table.get_mut("forward")? {
        Item::ArrayOfTables(tables) => {
            let mut table = Table::new();
            table.decor_mut().set_prefix("\n");
            write_forward(&mut table, forward);
            tables.push(table);
        }
        Item::Value(Value::Array(array)) => {
            let mut table = InlineTable::new();
            write_forward(&mut table, forward);
            array.push(table);
        }
        _ => return None,
    }
    Some(ended(document.to_string()))
}

/// A file ends with the end of a line, also after a table that was put there.
fn ended(mut text: String) -> String {
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

/// The text without those forwards of a guest that are meant; `None` as for [`add_forward`].
pub(crate) fn remove_forward(text: &str, guest: &Name, is_meant: impl Fn(&str) -> bool) -> Option<String> {
    let mut document: DocumentMut = text.parse().ok()?;
    let table = guest_table(&mut document, guest)?;
    let named = |item: Option<&str>| item.is_some_and(&is_meant);
    let left = match table.get_mut("forward")? {
        Item::ArrayOfTables(tables) => {
            tables.retain(|table| !named(table.get("name").and_then(Item::as_str)));
            tables.len()
        }
        Item::Value(Value::Array(array)) => {
            array.retain(|element| {
                let name = element.as_inline_table().and_then(|table| table.get("name"));
                !named(name.and_then(Value::as_str))
            });
            array.len()
        }
        _ => return None,
    };
    if left == 0 {
        table.remove("forward");
    }
    Some(ended(document.to_string()))
}

fn guest_table<'d>(document: &'d mut DocumentMut, guest: &Name) -> Option<&'d mut dyn TableLike> {
    let guests = document.get_mut("guest")?.as_table_like_mut()?;
    guests.get_mut(guest.as_str())?.as_table_like_mut()
}

fn write_forward(table: &mut dyn TableLike, forward: &Forward) {
    table.insert("name", value(forward.name.as_str()));
    if let Some(service) = &forward.service {
        table.insert("service", value(service.as_str()));
    }
    table.insert("listen", value(forward.listens()));
    table.insert("port", value(i64::from(forward.port)));
    if let Some(translated) = &forward.translated {
        table.insert("via", value("kernel"));
        table.insert("protocol", value(translated.transport.to_string()));
    }
}

/// The lines that say the same, for somebody to add.
pub(crate) fn lines(guest: &Name, forward: &Forward) -> String {
    let mut table = Table::new();
    write_forward(&mut table, forward);
    format!("[[guest.{guest}.forward]]\n{table}")
}

/// Puts `new` in the place of `old`, at once; mode and owner stay, and a link goes on to lead there.
///
/// # Errors
/// The system's own; `InvalidData` when the file is not `old` any more.
pub(crate) fn replace(path: &Path, old: &str, new: &str) -> io::Result<()> {
    let path = path.canonicalize()?;
    if fs::read(&path)? != old.as_bytes() {
        let text = "somebody else changed the file meanwhile";
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let before = fs::metadata(&path)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let fresh = path.with_file_name(name);
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&fresh)?;
        file.write_all(new.as_bytes())?;
        let own = file.metadata()?;
        if (own.uid(), own.gid()) != (before.uid(), before.gid()) {
            chown(&fresh, Some(before.uid()), Some(before.gid()))?;
        }
        file.set_permissions(before.permissions())?;
        file.sync_all()?;
        fs::rename(&fresh, &path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&fresh); // the first error is the one to tell
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sql() -> Name {
        Name::parse("sql").unwrap()
    }

    fn forward(service: Option<&str>) -> Forward {
        Forward {
            name: Name::parse("db").unwrap(),
            service: service.map(|text| Name::parse(text).unwrap()),
            listen: "127.0.0.1:15433".parse().unwrap(),
            port: 5432,
            translated: None,
        }
    }

    const FILE: &str = "# mine\n[guest.sql] # a guest\nmemory  =  \"256MiB\"\n\n\
        [guest.sql.service.db]\nkind = \"postgres\"\n\n\
        # the first\n[[guest.sql.forward]]\nname = \"old\" # why\nservice = \"db\"\nlisten = \"127.0.0.1:1\"\n\n\
        # another guest\n[guest.web]\n";

    #[test]
    fn a_forward_comes_after_the_others_and_nothing_else_changes() {
        let edited = add_forward(FILE, &sql(), &forward(Some("pg"))).unwrap();
        let added = "\n[[guest.sql.forward]]\nname = \"db\"\nservice = \"pg\"\nlisten = \"127.0.0.1:15433\"\nport = 5432\n";
        let (before, after) = FILE.split_once("\n# another guest").unwrap();
        assert_eq!(edited, format!("{before}{added}\n# another guest{after}"));
        let back = remove_forward(&edited, &sql(), |name| name == "db").unwrap();
        assert_eq!(back, FILE);
    }

    #[test]
    fn the_first_and_the_last_forward() {
        let none = remove_forward(FILE, &sql(), |name| name == "old").unwrap();
        assert!(
            !none.contains("forward") && none.contains("# another guest\n[guest.web]"),
            "{none}"
        );
        let first = add_forward(&none, &sql(), &forward(None)).unwrap();
        assert!(
            first.contains("[[guest.sql.forward]]\nname = \"db\"\nlisten"),
            "{first}"
        );
    }

    #[test]
    fn inline_forms_stay_inline() {
        let text = "[guest]\nsql = { service.db = { kind = \"postgres\" } } # short\n";
        let edited = add_forward(text, &sql(), &forward(None)).unwrap();
        assert!(edited.contains("forward = [{ name = \"db\""), "{edited}");
        assert!(edited.ends_with("# short\n"));
        let listed = "[guest.sql]\nforward = [{ name = \"a\", listen = \"127.0.0.1:1\" }]\n";
        let edited = add_forward(listed, &sql(), &forward(None)).unwrap();
        assert!(
            edited.contains("{ name = \"a\"") && edited.contains("{ name = \"db\""),
            "{edited}"
        );
        let back = remove_forward(&edited, &sql(), |name| name == "db").unwrap();
        assert_eq!(back, listed);
    }

    #[test]
    fn what_is_no_table_is_left_alone() {
        for text in [
            "",
            "guest = 1\n",
            "[guest]\nsql = 1\n",
            "[guest.sql]\nforward = 1\n",
            "[guest",
        ] {
            assert_eq!(add_forward(text, &sql(), &forward(None)), None, "{text}");
        }
        let said = lines(&sql(), &forward(None));
        assert!(
            said.starts_with("[[guest.sql.forward]]\nname = \"db\"\n"),
            "{said}"
        );
    }

    #[test]
    fn a_replaced_file_keeps_mode_and_link_and_is_not_taken_from_somebody_else() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        fs::write(&real, "old").unwrap();
        fs::set_permissions(&real, fs::Permissions::from_mode(0o640)).unwrap();
        symlink("real", &link).unwrap();
        replace(&link, "old", "new").unwrap();
        assert_eq!(fs::read_to_string(&real).unwrap(), "new");
        assert_eq!(fs::metadata(&real).unwrap().permissions().mode() & 0o777, 0o640);
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        let error = replace(&link, "old", "newer").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
