package manual

import (
	"embed"
	"fmt"
	"slices"
	"strings"
)

// The folder prose has a file for each page, with the texts that the declarations of commands and
// flags do not have. The files are Markdown with a few elements only, which the type block lists.
// The text before the first heading is the description. The other sections follow it.
//
//go:embed prose/*.md
var proseFiles embed.FS

// prose is the content of a file in the folder prose.
type prose struct {
	description []block
	sections    []proseSection
}

type proseSection struct {
	title  string
	blocks []block
}

// A block is one element of Markdown: a paragraph, or one of the others that a field says.
type block struct {
	kind  blockKind
	term  string // of an item
	lines []string
}

type blockKind int

const (
	paragraph  blockKind = iota
	subheading           // ### TITLE
	bullet               // - TEXT
	item                 // TERM, with the next line : TEXT
	example              // lines between two lines ```
)

// readProse reads the file of a page. A page without a file has no prose.
func readProse(name string) (*prose, error) {
	text, err := proseFiles.ReadFile("prose/" + name + ".md")
	if err != nil {
		return new(prose), nil
	}
	p, err := parseProse(string(text))
	if err != nil {
		return nil, fmt.Errorf("prose/%s.md: %w", name, err)
	}
	return p, nil
}

func parseProse(text string) (*prose, error) {
	p := new(prose)
	current := &p.description
	for _, chunk := range strings.Split(strings.TrimSpace(text), "\n\n") {
		lines := strings.Split(chunk, "\n")
		if title, ok := strings.CutPrefix(lines[0], "## "); ok {
			if len(lines) > 1 {
				return nil, fmt.Errorf("the heading %q needs an empty line after it", title)
			}
			p.sections = append(p.sections, proseSection{title: title})
			current = &p.sections[len(p.sections)-1].blocks
			continue
		}
		*current = append(*current, parseBlocks(lines)...)
	}
	return p, nil
}

// parseBlocks parses lines without an empty line between them.
func parseBlocks(lines []string) (blocks []block) {
	if n := len(lines); n > 2 && lines[0] == "```" && lines[n-1] == "```" {
		return []block{{kind: example, lines: lines[1 : n-1]}}
	}
	for i, l := range lines {
		switch {
		case strings.HasPrefix(l, "### "):
			blocks = append(blocks, block{kind: subheading, lines: []string{l[4:]}})
		case strings.HasPrefix(l, "- "):
			blocks = append(blocks, block{kind: bullet, lines: []string{l[2:]}})
		case i+1 < len(lines) && strings.HasPrefix(lines[i+1], ": "):
			blocks = append(blocks, block{kind: item, term: l})
		case strings.HasPrefix(l, ": "):
			blocks[len(blocks)-1].lines = []string{l[2:]}
		case i == 0:
			blocks = append(blocks, block{lines: []string{l}})
		default:
			last := &blocks[len(blocks)-1]
			last.lines = append(last.lines, strings.TrimSpace(l))
		}
	}
	return blocks
}

// The method blocks appends blocks to the page.
func (p *page) blocks(blocks []block) {
	for _, b := range blocks {
		text := inline(strings.Join(b.lines, " "))
		switch b.kind {
		case paragraph:
			p.paragraph(text)
		case subheading:
			p.subsection(b.lines[0])
		case bullet:
			p.bullet(text)
		case item:
			p.item(inline(b.term), text)
		case example:
			p.example(b.lines...)
		}
	}
}

// placed are the titles of the sections of prose that have a fixed place on a page. All other
// sections follow the options, in the order of the file.
var placed = []string{"ENVIRONMENT", "FILES", "EXAMPLES", "NOTES"}

// The method sections appends the sections of the prose with a title in placed, or, if title is "",
// all other sections.
func (p *page) sections(texts *prose, title string) {
	for _, s := range texts.sections {
		if s.title == title || title == "" && !slices.Contains(placed, s.title) {
			p.section(s.title)
			p.blocks(s.blocks)
		}
	}
}
