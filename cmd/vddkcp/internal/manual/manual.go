// Package manual writes the manual pages of vddkcp, with [Book.Write], and what --help prints, with
// [Book.Help]. It makes both from the declarations of the commands and flags, so that they cannot
// differ from the program. The manual pages also have the texts in the folder prose.
package manual

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/alecthomas/kong"
)

// Book has what the manual pages are made from.
type Book struct {
	App      *kong.Application
	Version  string
	Date     time.Time // shown at the bottom of the pages; the zero value leaves it out
	Examples []Example
	Statuses []Status
	JobFile  []Object
}

// Example is a command line that shows how a command is used.
type Example struct {
	Command string // names of the command and its parents, such as "profile add"; "" is the program
	About   string // a sentence
	Line    string
}

// Status is an exit status.
type Status struct {
	Status   string   // a number, or several
	Meaning  string   // a clause without a full stop
	Commands []string // the commands that end with it; nil: all
}

// Of returns the examples of a command.
func Of(examples []Example, command string) (all []Example) {
	for _, e := range examples {
		if e.Command == command {
			all = append(all, e)
		}
	}
	return all
}

// Write writes all pages into a folder, which it creates if it does not exist. There is a page for
// the program, one for each command, which includes the commands below it, and one for job files.
// The result has the names of the files.
func (b *Book) Write(dir string) (files []string, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	pages := map[string]func() (string, error){b.App.Name + ".1": b.program, b.App.Name + "-jobs.5": b.jobs}
	for _, c := range b.commands() {
		pages[b.pageOf(c)+".1"] = func() (string, error) { return b.command(c) }
	}
	for name, make := range pages {
		text, err := make()
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return nil, err
		}
		files = append(files, name)
	}
	slices.Sort(files)
	return files, nil
}

// The method commands returns the commands that have pages.
func (b *Book) commands() []*kong.Node {
	return slices.DeleteFunc(slices.Clone(b.App.Children), func(c *kong.Node) bool { return c.Hidden })
}

func (b *Book) pageOf(c *kong.Node) string { return b.App.Name + "-" + c.Name }

func (b *Book) newPage(name, section string) *page {
	date := ""
	if !b.Date.IsZero() {
		date = b.Date.UTC().Format(time.DateOnly)
	}
	p := new(page)
	p.title(name, section, date, b.App.Name+" "+b.Version)
	return p
}

// The method program returns the page of the program, which is about all commands.
func (b *Book) program() (string, error) {
	texts, err := readProse(b.App.Name)
	if err != nil {
		return "", err
	}
	p := b.newPage(b.App.Name, "1")
	p.section("NAME")
	p.paragraph(plain(b.App.Name) + ` \- copy virtual disks of VMware`)
	p.section("SYNOPSIS")
	p.paragraph(bold(b.App.Name) + ` [` + bold("copy") + `] ` + italic("SRC") + " " + italic("DST") + ` [` + italic("OPTION") + `]...`)
	p.line(".br")
	p.empty = true
	p.paragraph(bold(b.App.Name) + ` ` + italic("COMMAND") + ` [` + italic("ARGUMENT") + `]... [` + italic("OPTION") + `]...`)
	p.section("DESCRIPTION")
	p.blocks(texts.description)
	p.section("COMMANDS")
	for i, g := range groups(b.commands(), func(c *kong.Node) *kong.Group { return c.Group }) {
		if g.title != "" {
			p.subsection(g.title)
		} else if i > 0 {
			return "", fmt.Errorf("the command %s has no group", g.members[0].Name)
		}
		for _, c := range g.members {
			p.item(reference(b.pageOf(c), "1"), helpText(c.Help))
		}
	}
	b.options(p, b.App.Node)
	p.sections(texts, "")
	p.sections(texts, "ENVIRONMENT")
	p.sections(texts, "FILES")
	b.statuses(p, "")
	b.examples(p, b.App.Node)
	p.sections(texts, "NOTES")
	var pages []string
	for _, c := range b.commands() {
		pages = append(pages, reference(b.pageOf(c), "1"))
	}
	p.section("SEE ALSO")
	p.paragraph(strings.Join(append(pages, reference(b.App.Name+"-jobs", "5")), ", "))
	return p.text.String(), nil
}

// The method command returns the page of a command, with the commands below it.
func (b *Book) command(c *kong.Node) (string, error) {
	texts, err := readProse(c.Name)
	if err != nil {
		return "", err
	}
	p := b.newPage(b.pageOf(c), "1")
	p.section("NAME")
	p.paragraph(plain(b.pageOf(c)) + ` \- ` + helpText(summary(c.Help)))
	p.section("SYNOPSIS")
	for i, leaf := range leaves(c) {
		if i > 0 {
			p.line(".br")
			p.empty = true
		}
		p.paragraph(synopsis(leaf))
	}
	p.section("DESCRIPTION")
	p.paragraph(helpText(c.Help))
	p.blocks(texts.description)
	if all := leaves(c); len(all) > 1 {
		p.section("COMMANDS")
		for _, leaf := range all {
			p.subsection(leaf.FullPath())
			p.paragraph(helpText(leaf.Help))
			arguments(p, leaf)
			b.flags(p, leaf.Flags)
		}
		p.section("OPTIONS")
		b.flags(p, slices.Concat(c.AllFlags(true)...))
	} else {
		if len(c.Positional) > 0 {
			p.section("ARGUMENTS")
			arguments(p, c)
		}
		b.options(p, c)
	}
	p.sections(texts, "")
	b.environment(p, c, texts)
	p.sections(texts, "FILES")
	b.statuses(p, c.Name)
	b.examples(p, c)
	p.sections(texts, "NOTES")
	p.section("SEE ALSO")
	b.seeAlso(p, c)
	return p.text.String(), nil
}

// related are the pages that a page names in its section SEE ALSO, besides vddkcp(1).
var related = map[string][]string{
	"check":      {"cleanup", "vddk", "profile"},
	"cleanup":    {"vm", "ls"},
	"copy":       {"vm", "run", "verify", "export", "info"},
	"export":     {"copy", "map"},
	"info":       {"map", "copy"},
	"jobs":       {"run", "ls"},
	"ls":         {"jobs", "check", "vm"},
	"map":        {"info", "copy"},
	"profile":    {"thumbprint", "check"},
	"run":        {"jobs", "vm", "copy"},
	"thumbprint": {"profile", "check"},
	"vddk":       {"check", "copy"},
	"verify":     {"copy", "map"},
	"vm":         {"copy", "check", "cleanup", "run"},
}

func (b *Book) seeAlso(p *page, c *kong.Node) {
	pages := []string{reference(b.App.Name, "1")}
	for _, name := range related[c.Name] {
		pages = append(pages, reference(b.App.Name+"-"+name, "1"))
	}
	if c.Name == "run" || c.Name == "jobs" {
		pages = append(pages, reference(b.App.Name+"-jobs", "5"))
	}
	p.paragraph(strings.Join(pages, ", "))
}

// The function reference returns the name of a page in the form in which pages name others. The \%
// keeps the name on one line.
func reference(page, section string) string { return `\%` + bold(page) + "(" + section + ")" }

// The function summary returns the first sentence of a help text for the section NAME.
func summary(help string) string {
	first, _, _ := strings.Cut(help, ". ")
	letter, size := utf8.DecodeRuneInString(first)
	return string(unicode.ToLower(letter)) + strings.TrimSuffix(first[size:], ".")
}

// The function leaves returns the commands below a command, or the command itself if there is none.
func leaves(c *kong.Node) []*kong.Node {
	if all := c.Leaves(true); len(all) > 0 {
		return all
	}
	return []*kong.Node{c}
}

func synopsis(c *kong.Node) string {
	words := []string{bold(c.FullPath())}
	for _, a := range c.Positional {
		word := italic(a.Name)
		if !a.Required {
			word = "[" + word + "]"
		}
		words = append(words, word)
	}
	for _, group := range c.AllFlags(true) {
		for _, f := range group {
			if f.Required {
				words = append(words, flagTag(f))
			}
		}
	}
	return strings.Join(append(words, "["+italic("OPTION")+"]..."), " ")
}
