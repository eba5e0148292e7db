//! The laws of this repository that a compiler does not check. A violation is one line: file, rule, what to do.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use qpeft::adapters::method::METHODS;
use qpeft::cli::{Parsed, parse};
use sha2::{Digest, Sha256};

/// Lines of code a file may have; its tests do not count.
const LONGEST: usize = 600;

/// The floors of the root package, and what a file of each may not name.
const FLOORS: &[(&str, &[&str])] = &[
    ("error", &["adapters", "train", "convert", "cli"]),
    ("model", &["adapters", "train", "convert", "cli"]),
    ("adapters", &["train", "convert", "cli"]),
    ("train", &["convert", "cli"]),
    ("convert", &["train", "cli"]),
];

/// What no code may say, and what to say instead.
const FORBIDDEN: &[(&str, &str)] = &[
    ("todo!", "finish it or refuse with an error"),
    ("unimplemented!", "finish it or refuse with an error"),
    ("dbg!", "remove it"),
    ("cfg(feature", "there are no cargo features; decide at run time"),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The files below `folder`, as paths from the root with `/`, sorted.
fn files(folder: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root().join(&folder)).expect("the folder exists") {
            let entry = entry.expect("the folder can be listed");
            let path = folder.join(entry.file_name());
            if entry.file_type().expect("the entry has a type").is_dir() {
                folders.push(path);
            } else {
                found.push(path.to_str().expect("names are UTF-8").replace('\\', "/"));
            }
        }
    }
    found.sort();
    found
}

/// One source file, without comments and the content of literals.
struct Source {
    path: String,
    /// With comments and literals.
    text: String,
    /// All code.
    code: String,
    /// The code outside of items under `#[cfg(test)]`; empty for a file that is a test.
    shipped: String,
}

fn sources() -> Vec<Source> {
    let mut sources = Vec::new();
    for folder in [
        "src",
        "tests",
        "formats/src",
        "formats/tests",
        "formats/fuzz/src",
        "formats/fuzz/targets",
        "kernels/src",
    ] {
        for path in
            files(folder).into_iter().filter(|path| path.rsplit_once('.').is_some_and(|(_, end)| end == "rs"))
        {
            let text = read(&path);
            let code = without_comments_and_literals(&text);
            let is_test = folder.ends_with("tests") || folder.starts_with("formats/fuzz");
            let shipped = if is_test { String::new() } else { without_tests(&code).0 };
            sources.push(Source { path, text, code, shipped });
        }
    }
    let tests = sources.iter().flat_map(test_modules).collect::<Vec<_>>();
    for source in &mut sources {
        if tests.contains(&source.path) {
            source.shipped.clear();
        }
    }
    sources
}

/// Whether cargo finds the file by itself.
fn is_root(path: &str) -> bool {
    let (folder, name) = path.rsplit_once('/').expect("sources lie in folders");
    matches!(name, "lib.rs" | "main.rs")
        || matches!(folder, "tests" | "formats/tests" | "formats/fuzz/targets")
}

/// Where the modules lie that a source declares.
fn folder_of_modules(path: &str) -> &str {
    match path.rsplit_once('/') {
        Some((folder, name)) if name == "mod.rs" || is_root(path) => folder,
        _ => path.trim_end_matches(".rs"),
    }
}

/// The files that a source declares with `#[cfg(test)] mod name;`.
fn test_modules(source: &Source) -> Vec<String> {
    let folder = folder_of_modules(&source.path);
    let declared = without_tests(&source.code).1;
    declared.iter().map(|name| format!("{folder}/{name}.rs")).collect()
}

/// The files that a source may mean with `mod name;`.
fn modules(source: &Source) -> Vec<String> {
    let folder = folder_of_modules(&source.path);
    let declarations =
        source.code.lines().filter_map(|line| line.trim().strip_suffix(';')?.split_once("mod "));
    let names = declarations.filter(|(before, _)| before.is_empty() || before.starts_with("pub"));
    names.flat_map(|(_, name)| [format!("{folder}/{name}.rs"), format!("{folder}/{name}/mod.rs")]).collect()
}

/// Code without the items under `#[cfg(test)]`, and the names of the modules among them that are files.
/// rustfmt puts the closing brace of an item at the indentation of its first line.
fn without_tests(code: &str) -> (String, Vec<String>) {
    let (mut kept, mut modules) = (String::new(), Vec::new());
    let mut lines = code.lines();
    while let Some(line) = lines.next() {
        if line.trim() != "#[cfg(test)]" {
            kept.push_str(line);
            kept.push('\n');
            continue;
        }
        let indent = &line[..line.len() - line.trim_start().len()];
        let ends =
            [format!("{indent}}}"), format!("{indent}}};"), format!("{indent});"), format!("{indent}];")];
        for line in lines.by_ref() {
            if let Some(name) = line.trim().strip_suffix(';').and_then(|item| item.split("mod ").nth(1)) {
                modules.push(name.to_owned());
            }
            let whole = line.starts_with(indent) && !line[indent.len()..].starts_with([' ', '#', ')', '}']);
            let one_line = whole && (line.ends_with(';') || line.ends_with('}') || line.ends_with(','));
            if one_line || ends.iter().any(|end| end == line) {
                break;
            }
        }
    }
    (kept, modules)
}

/// Blanks comments and the content of string and character literals; lines stay lines.
fn without_comments_and_literals(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let before = code.chars().next_back().unwrap_or(' ');
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(length) = raw_string(rest).filter(|_| !before.is_alphanumeric()) {
            length
        } else if first == '"' {
            quoted(rest, '"').expect("a string ends")
        } else if first == '\'' {
            // A lifetime has no closing quote right behind it.
            quoted(rest, '\'')
                .filter(|&n| rest[1..].starts_with('\\') || rest[..n].chars().count() == 3)
                .unwrap_or(0)
        } else {
            0
        };
        if length == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            // The space last: what follows a text of many lines must not look like the start of an item.
            code.extend(rest[..length].chars().filter(|&c| c == '\n'));
            code.push(' ');
            rest = &rest[length..];
        }
    }
    code
}

/// Bytes of the raw string that `text` starts with.
fn raw_string(text: &str) -> Option<usize> {
    let inner = text.strip_prefix("br").or_else(|| text.strip_prefix('r'))?;
    let hashes = inner.len() - inner.trim_start_matches('#').len();
    let body = inner[hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    Some(text.len() - body.len() + body.find(&end)? + end.len())
}

/// Bytes of the literal in `quote`s that `text` starts with.
fn quoted(text: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    for (i, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return Some(i + 1),
            _ => {}
        }
    }
    None
}

/// Whether `code` has `word` with no letter, digit or underscore around it.
fn has_word(code: &str, word: &str) -> bool {
    let in_name = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(i, _)| {
        !code[..i].chars().next_back().is_some_and(in_name)
            && !code[i + word.len()..].chars().next().is_some_and(in_name)
    })
}

/// The modules right below the crate's root that a file of the root package names, by `crate::` or `super::`.
fn named_floors(path: &str, code: &str) -> Vec<String> {
    let depth = path.split('/').count() - 1 - usize::from(path.ends_with("/mod.rs"));
    let escape = "super::".repeat(depth);
    let mut names = Vec::new();
    for start in ["crate::", &escape] {
        for (i, _) in code.match_indices(start) {
            let rest = &code[i + start.len()..];
            let paths = match rest.strip_prefix('{') {
                Some(group) => outermost(group),
                None => vec![rest],
            };
            for path in paths {
                let end = path.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(path.len());
                names.push(path[..end].to_owned());
            }
        }
    }
    names
}

/// The entries of `a, b::{c, d}, e}`, not those of inner groups.
fn outermost(group: &str) -> Vec<&str> {
    let (mut entries, mut depth, mut start) = (Vec::new(), 0, 0);
    for (i, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            '}' | ',' if depth == 0 => {
                entries.push(group[start..i].trim());
                start = i + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    entries
}

/// The rows of the first table after `heading`, as trimmed cells, without its head.
fn table(text: &str, heading: &str) -> Vec<Vec<String>> {
    text.lines()
        .skip_while(|line| *line != heading)
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect())
        .collect()
}

/// The content of the fenced blocks of a language.
fn fenced(text: &str, language: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line == format!("```{language}") {
            blocks.push(lines.by_ref().take_while(|line| *line != "```").collect::<Vec<_>>().join("\n"));
        }
    }
    blocks
}

/// The words of a shell command, with double quotes.
fn words(command: &str) -> Vec<String> {
    let (mut words, mut word, mut in_quotes) = (Vec::new(), String::new(), false);
    for c in command.chars().chain([' ']) {
        match c {
            '"' => in_quotes = !in_quotes,
            ' ' if !in_quotes => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            c => word.push(c),
        }
    }
    words
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        write!(text, "{byte:02x}").expect("a string takes any text");
    }
    text
}

#[track_caller]
fn holds(violations: &[String]) {
    assert!(violations.is_empty(), "\n{}", violations.join("\n"));
}

#[test]
fn a_file_holds_one_idea() {
    let mut violations = Vec::new();
    for source in sources() {
        let code = if source.shipped.is_empty() { &source.code } else { &source.shipped };
        let lines = code.lines().filter(|line| !line.trim().is_empty()).count();
        if lines > LONGEST {
            violations.push(format!("{}: {lines} lines of code, at most {LONGEST}: split it", source.path));
        }
    }
    holds(&violations);
}

#[test]
fn a_file_opens_with_what_lives_in_it() {
    let bare = sources().into_iter().filter(|source| !source.text.starts_with("//! "));
    holds(&bare.map(|s| format!("{}: must start with a `//!` paragraph", s.path)).collect::<Vec<_>>());
}

#[test]
fn a_file_is_part_of_the_build() {
    let sources = sources();
    let declared = sources.iter().flat_map(modules).collect::<Vec<_>>();
    let lost = sources.iter().filter(|source| !is_root(&source.path) && !declared.contains(&source.path));
    let mut violations =
        lost.map(|source| format!("{}: no `mod` declares it: remove it", source.path)).collect::<Vec<_>>();
    let kernels = files("kernels/src").into_iter();
    for path in
        kernels.filter(|path| path.rsplit_once('.').is_some_and(|(_, end)| matches!(end, "cu" | "cuh")))
    {
        let name = path.rsplit('/').next().unwrap_or_default();
        let quoted = [format!("\"{name}\""), format!("/{name}\"")];
        if !sources.iter().any(|source| quoted.iter().any(|name| source.text.contains(name))) {
            violations.push(format!("{path}: no source includes it: remove it"));
        }
    }
    holds(&violations);
}

#[test]
fn a_floor_names_only_those_below() {
    let mut violations = Vec::new();
    for source in sources() {
        let Some(module) = source.path.strip_prefix("src/") else { continue };
        let floor = module.split(['/', '.']).next().unwrap_or_default();
        let Some((_, above)) = FLOORS.iter().find(|(name, _)| *name == floor) else { continue };
        for name in named_floors(&source.path, &source.code) {
            if above.contains(&name.as_str()) {
                violations.push(format!("{}: names `{name}`, which `{floor}` may not", source.path));
            }
        }
    }
    holds(&violations);
}

#[test]
fn a_method_of_the_registry_has_its_file() {
    let path = |name: &str| format!("src/adapters/{name}.rs");
    let missing = METHODS.iter().map(|row| path(row.name)).filter(|path| !root().join(path).exists());
    holds(&missing.map(|path| format!("{path}: is in the registry but not there")).collect::<Vec<_>>());
}

#[test]
fn test_data_is_listed_with_its_hash() {
    let list = read("testdata/README.md");
    let listed = list
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
        .map(|(path, rest)| {
            (path, rest.trim_end_matches(" |").rsplit(' ').next().unwrap_or_default().trim_matches('`'))
        })
        .collect::<BTreeMap<_, _>>();
    let found = files("testdata");
    let found =
        found.iter().filter_map(|path| path.strip_prefix("testdata/")).filter(|path| *path != "README.md");
    let found = found.collect::<Vec<_>>();
    let mut violations = Vec::new();
    for path in &found {
        let bytes = fs::read(root().join("testdata").join(path)).expect("the file was listed");
        let hash = hex(&Sha256::digest(&bytes));
        match listed.get(path) {
            Some(known) if *known == hash => {}
            Some(_) => violations.push(format!("testdata/{path}: changed; if meant, list the hash `{hash}`")),
            None => {
                violations.push(format!("testdata/{path}: not in testdata/README.md; list it with `{hash}`"));
            }
        }
    }
    for path in listed.keys().filter(|path| !found.contains(path)) {
        violations.push(format!("testdata/{path}: in testdata/README.md but not there"));
    }
    holds(&violations);
}

#[test]
fn unsafe_code_stays_where_it_is_expected() {
    let allowed = |path: &str| {
        // The last one is the counting allocator of the tests.
        path.starts_with("kernels/src/")
            || path == "formats/src/file.rs"
            || path == "formats/tests/hostile/alloc.rs"
    };
    let stray =
        sources().into_iter().filter(|source| !allowed(&source.path) && has_word(&source.code, "unsafe"));
    holds(
        &stray
            .map(|s| format!("{}: `unsafe` outside of kernels and formats/src/file.rs", s.path))
            .collect::<Vec<_>>(),
    );
}

#[test]
fn nothing_is_left_for_later() {
    let mut violations = Vec::new();
    for source in sources() {
        for (text, instead) in FORBIDDEN {
            if source.code.contains(text) {
                violations.push(format!("{}: `{text}`: {instead}", source.path));
            }
        }
        if source.shipped.contains(".unwrap()") {
            violations.push(format!(
                "{}: `.unwrap()` outside of tests: return an error, or `expect` why not",
                source.path
            ));
        }
    }
    holds(&violations);
}

#[test]
fn the_readme_lists_the_methods_of_the_registry() {
    let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
    let registry = METHODS
        .iter()
        .map(|row| vec![format!("`{}`", row.name), row.about.to_owned(), yes(row.magnitude), yes(row.staged)])
        .collect::<Vec<_>>();
    assert_eq!(table(&read("README.md"), "## Methods"), registry, "README.md: the table under `## Methods`");
}

#[test]
fn every_command_of_the_readme_parses() {
    let readme = read("README.md");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = folder.path().join("run.yaml");
    fs::write(&config, fenced(&readme, "yaml").concat()).expect("the folder is writable");
    let mut count = 0;
    for line in fenced(&readme, "sh").iter().flat_map(|block| block.lines()) {
        let line = line.replacen("cargo run --release -- ", "qpeft ", 1);
        if !line.starts_with("qpeft ") {
            assert_eq!(line, "cargo test --release", "README.md: neither a command of qpeft nor the tests");
            continue;
        }
        let argv = words(&line).into_iter().map(|word| match word.as_str() {
            "run.yaml" => config.clone().into_os_string(),
            _ => OsString::from(word),
        });
        let parsed = parse(argv);
        assert!(matches!(parsed, Ok(Parsed::Run(_))), "README.md: `{line}`: {parsed:?}");
        count += 1;
    }
    assert!(count >= 10, "README.md: only {count} commands found");
}

#[test]
fn the_readers_of_this_file_read_rust() {
    let text = "let a = \"unsafe // \\\" x\"; // unsafe\nlet b = 'x'; fn f<'a>() {} let c = r#\"dbg!\"#; let d = '\\'';\n";
    let code = without_comments_and_literals(text);
    assert_eq!(code, "let a =  ;  \nlet b =  ; fn f<'a>() {} let c =  ; let d =  ;\n");
    assert!(has_word("unsafe { }", "unsafe") && !has_word("forbid(unsafe_code)", "unsafe"));

    let code = "a\n#[cfg(test)]\npub(crate) mod testing;\nb\n#[cfg(test)]\nfn f(\n    x: u8,\n) {\n    y\n}\nc\n#[cfg(test)]\nmod tests {\n}\n";
    assert_eq!(without_tests(code), ("a\nb\nc\n".to_owned(), vec!["testing".to_owned()]));

    let names = named_floors(
        "src/model/a.rs",
        "use crate::{train::{x, cli}, model}; use super::super::cli; use super::b;",
    );
    assert_eq!(names, ["train", "model", "cli"]);
}
