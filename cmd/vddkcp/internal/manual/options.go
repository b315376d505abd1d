package manual

import (
	"cmp"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
)

func arguments(p *page, c *kong.Node) {
	for _, a := range c.Positional {
		p.item(italic(a.Name), helpText(a.Help))
	}
}

// The method options appends the section about the flags of a command. The flags that all commands
// have come last.
func (b *Book) options(p *page, c *kong.Node) {
	p.section("OPTIONS")
	b.flags(p, c.Flags)
	if c.Parent == nil {
		return
	}
	if len(c.Flags) > 0 {
		p.subsection("Common options")
	}
	for _, f := range slices.Concat(c.Parent.AllFlags(true)...) {
		p.item(flagTag(f), helpText(description(f)))
	}
}

// The method flags appends flags. Each group of flags has its own subsection, except those without
// a group.
func (b *Book) flags(p *page, flags []*kong.Flag) {
	for _, g := range flagGroups(flags) {
		if g.title != "" {
			p.subsection(g.title)
		}
		for _, f := range g.members {
			text := helpText(description(f))
			if len(f.Envs) > 0 {
				text += " The environment variable " + bold(f.Envs[0]) + " sets the default."
			}
			p.item(flagTag(f), text)
		}
	}
}

// groupOrder has the titles of groups of flags in the order in which a reader needs them. Flags
// without a group, and groups that only one command has, come first.
var groupOrder = []string{"VM", "Target", "Source", "Speed", "Report", "Snapshot", "VDDK", "Log"}

// flagGroups returns the groups of the flags that are not hidden.
func flagGroups(flags []*kong.Flag) []group[*kong.Flag] {
	flags = slices.DeleteFunc(slices.Clone(flags), func(f *kong.Flag) bool { return f.Hidden })
	all := groups(flags, func(f *kong.Flag) *kong.Group { return f.Group })
	slices.SortStableFunc(all, func(a, b group[*kong.Flag]) int {
		return cmp.Compare(groupPlace(a.title), groupPlace(b.title))
	})
	return all
}

// groupPlace returns the place of a group on a page.
func groupPlace(title string) int {
	if title == "" {
		return -2
	}
	return slices.Index(groupOrder, title)
}

func flagTag(f *kong.Flag) string {
	tag := bold("--" + f.Name)
	if !f.IsBool() {
		tag += "=" + italic(placeholder(f))
	}
	if f.Short != 0 {
		tag = bold("-"+string(f.Short)) + ", " + tag
	}
	return tag
}

// The function placeholder returns what stands for the value of a flag. A flag that has no
// placeholder has a few values, which stand there.
func placeholder(f *kong.Flag) string {
	switch {
	case f.PlaceHolder != "":
		return f.PlaceHolder
	case f.Enum != "":
		return strings.ReplaceAll(f.Enum, ",", "|")
	}
	return strings.Trim(f.FormatPlaceHolder(), `"`)
}

// The function description returns the help text of a flag, with its default.
func description(f *kong.Flag) string {
	if f.Default == "" || strings.Contains(strings.ToLower(f.Help), "default") {
		return f.Help
	}
	return strings.TrimSuffix(f.Help, ".") + " (default " + f.Default + ")."
}

// A group has members of the same kong.Group. The title is "" for members without a group.
type group[T any] struct {
	title   string
	members []T
}

func groups[T any](all []T, of func(T) *kong.Group) (found []group[T]) {
	for _, member := range all {
		title := ""
		if g := of(member); g != nil {
			title = strings.TrimSuffix(g.Title, ":")
		}
		i := slices.IndexFunc(found, func(g group[T]) bool { return g.title == title })
		if i < 0 {
			found, i = append(found, group[T]{title: title}), len(found)
		}
		found[i].members = append(found[i].members, member)
	}
	return found
}

// The method environment appends the section about environment variables: those of the flags, and
// those of the prose.
func (b *Book) environment(p *page, c *kong.Node, texts *prose) {
	var names, flags []string
	for _, leaf := range leaves(c) {
		for _, f := range leaf.Flags {
			for _, name := range f.Envs {
				if !slices.Contains(names, name) {
					names, flags = append(names, name), append(flags, f.Name)
				}
			}
		}
	}
	written := slices.ContainsFunc(texts.sections, func(s proseSection) bool { return s.title == "ENVIRONMENT" })
	if len(names) == 0 && !written {
		return
	}
	if written {
		p.sections(texts, "ENVIRONMENT")
	} else {
		p.section("ENVIRONMENT")
	}
	for i, name := range names {
		p.item(bold(name), "Default of "+bold("--"+flags[i])+".")
	}
	if len(names) > 0 {
		p.item(bold("VDDKCP_PASSWORD")+", "+bold("VDDKCP_COOKIE"), "Secrets for the login at the server, if neither flags nor a profile give them.")
		p.paragraph(reference(b.App.Name, "1") + " says which of these variables are used together.")
	}
}

// The method statuses appends the section about the exit statuses of a command.
func (b *Book) statuses(p *page, command string) {
	p.section("EXIT STATUS")
	for _, s := range b.Statuses {
		if command == "" || s.Commands == nil || slices.Contains(s.Commands, command) {
			p.item(bold(s.Status), helpText(s.Meaning)+".")
		}
	}
}

// The method examples appends the section with the examples of a command.
func (b *Book) examples(p *page, c *kong.Node) {
	all := b.examplesOf(c)
	if len(all) == 0 {
		return
	}
	p.section("EXAMPLES")
	for _, e := range all {
		p.paragraph(helpText(e.About))
		p.example(e.Line)
	}
}

// The method examplesOf returns the examples of a command. Those of a command with further commands
// below it are the first ones of these.
func (b *Book) examplesOf(c *kong.Node) (all []Example) {
	if c.Parent == nil || len(c.Children) == 0 {
		return Of(b.Examples, c.Path())
	}
	for _, child := range c.Children {
		all = append(all, Of(b.Examples, child.Path())[:1]...)
	}
	return all
}
