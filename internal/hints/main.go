// Command hints collects the hints of vddkcp, with the messages that they belong to, for
// docs/guide/troubleshooting.md:
//
//	go run ./internal/hints -w    # replaces the tables of the page
//
// The hints are found in the source, by the names of variables, parameters and functions: see
// scanner. messages.go has what the source does not say.
package main

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

const (
	page  = "docs/guide/troubleshooting.md"
	begin = "<!-- The tables below are made by go run ./internal/hints -w. Do not edit them. -->"
	end   = "<!-- End of the tables. -->"
)

func main() {
	write := flag.Bool("w", false, "replace the tables of "+page)
	flag.Parse()
	if err := run(*write); err != nil {
		fmt.Fprintln(os.Stderr, "hints:", err)
		os.Exit(1)
	}
}

func run(write bool) error {
	text, err := tables(".")
	if err != nil || !write {
		fmt.Print(text)
		return err
	}
	old, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	updated, err := replace(string(old), text)
	if err != nil {
		return err
	}
	return os.WriteFile(page, []byte(updated), 0o644)
}

// replace replaces the tables of a page.
func replace(old, text string) (string, error) {
	before, rest, ok := strings.Cut(old, begin+"\n")
	_, after, ok2 := strings.Cut(rest, end+"\n")
	if !ok || !ok2 {
		return "", fmt.Errorf("%s does not have the lines %q and %q", page, begin, end)
	}
	return before + begin + "\n\n" + text + end + "\n" + after, nil
}

// tables returns the tables of the page for the repository in the folder root.
func tables(root string) (string, error) {
	entries, err := scan(root)
	if err != nil {
		return "", err
	}
	if entries, err = complete(entries, unknown); err != nil {
		return "", err
	}
	var b strings.Builder
	for n, g := range groups {
		var rows []row
		for _, e := range entries {
			if groupOf(e) == n {
				rows = appendRow(rows, e)
			}
		}
		slices.SortFunc(rows, func(a, b row) int { return strings.Compare(a.String(), b.String()) })
		fmt.Fprintf(&b, "### %s\n\n%s\n\n| message | what to do |\n|---|---|\n", g.title, g.text)
		for _, r := range rows {
			b.WriteString(r.String())
		}
		b.WriteString("\n")
	}
	b.WriteString("### Parts of hints\n\nThese texts stand before or after other hints:\n\n")
	for _, hint := range slices.Sorted(maps.Keys(parts)) {
		if parts[hint] != "" {
			fmt.Fprintf(&b, "- %s\n", cell(parts[hint]))
		}
	}
	b.WriteString("\n")
	return b.String(), nil
}

// complete adds the messages that the scan did not find, and drops parts of hints.
func complete(entries []entry, unknown map[string]string) ([]entry, error) {
	var result []entry
	var lacking []string
	used := map[string]bool{}
	for _, e := range entries {
		if _, ok := parts[e.hint]; ok || strings.HasPrefix(e.hint, "REASON; then ") || strings.HasPrefix(e.hint, "REASON; ") {
			continue
		}
		known := ""
		for start, message := range unknown {
			if strings.HasPrefix(e.hint, start) && len(start) > len(known) {
				known = start
				e.messages = []string{message}
			}
		}
		used[known] = true
		if len(e.messages) == 0 {
			lacking = append(lacking, fmt.Sprintf("%s:%d: %s", e.file, e.line, e.hint))
		}
		if w, ok := words[e.hint]; ok {
			e.hint = w
		}
		for i, m := range e.messages {
			if c, ok := corrected[m]; ok {
				e.messages[i] = c
			}
		}
		e.messages = slices.DeleteFunc(e.messages, func(m string) bool { return m == "" })
		result = append(result, e)
	}
	for start := range unknown {
		if !used[start] {
			lacking = append(lacking, "no hint needs the message of "+start)
		}
	}
	slices.Sort(lacking)
	if len(lacking) > 0 {
		return nil, fmt.Errorf("the table \"unknown\" in internal/hints/messages.go needs the messages of these hints, or has one too many:\n%s", strings.Join(lacking, "\n"))
	}
	return result, nil
}

// groupOf returns the index of the group of an entry.
func groupOf(e entry) int {
	for n, g := range groups {
		for _, start := range g.files {
			if strings.HasPrefix(filepath.ToSlash(e.file), start) {
				return n
			}
		}
	}
	return len(groups) - 1
}

// A row has the messages of one or several hints.
type row struct{ messages, hints []string }

func (r row) String() string {
	return "| " + strings.Join(r.messages, "<br>") + " | " + strings.Join(r.hints, "<br>Or: ") + " |\n"
}

// appendRow appends the row of an entry. Entries with the same hint or the same messages share a
// row.
func appendRow(rows []row, e entry) []row {
	hint := cell(e.hint)
	var messages []string
	for _, m := range e.messages {
		messages = append(messages, code(m))
	}
	for i, r := range rows {
		switch {
		case slices.Equal(r.messages, messages):
			if !slices.Contains(r.hints, hint) {
				rows[i].hints = append(r.hints, hint)
			}
			return rows
		case slices.Equal(r.hints, []string{hint}):
			for _, m := range messages {
				if !slices.Contains(rows[i].messages, m) {
					rows[i].messages = append(rows[i].messages, m)
				}
			}
			return rows
		}
	}
	return append(rows, row{messages, []string{hint}})
}

// code returns a text as code in a cell of a table.
func code(text string) string {
	return "`" + strings.NewReplacer("|", "\\|", "`", "'", "\n", " ").Replace(text) + "`"
}

// cell returns a text for a cell of a table. Markdown must not read its signs.
func cell(text string) string {
	return strings.NewReplacer("|", "\\|", "<", "\\<", "*", "\\*", "_", "\\_", "[", "\\[", "\n", " ").Replace(text)
}
