package manual

import (
	"fmt"
	"strings"
)

// Object is a JSON object of a job file.
type Object struct {
	Title  string // a heading
	About  string
	Fields []Field
}

// Field is a field of an Object.
type Field struct {
	Name, Help string
	Type       string // such as "integer or string"
	Values     []string
}

// The method jobs returns the page about job files.
func (b *Book) jobs() (string, error) {
	name := b.App.Name + "-jobs"
	texts, err := readProse("job-file")
	if err != nil {
		return "", err
	}
	p := b.newPage(name, "5")
	p.section("NAME")
	p.paragraph(plain(name) + ` \- job files of ` + b.App.Name + " run")
	p.section("DESCRIPTION")
	p.blocks(texts.description)
	for _, o := range b.JobFile {
		p.section(o.Title)
		p.paragraph(helpText(o.About))
		for _, f := range o.Fields {
			tag := bold(f.Name) + " (" + plain(f.Type) + ")"
			text := helpText(f.Help)
			if len(f.Values) > 0 {
				text += fmt.Sprintf(" Values: %s.", helpText(strings.Join(f.Values, ", ")))
			}
			p.item(tag, text)
		}
	}
	p.sections(texts, "")
	p.sections(texts, "FILES")
	p.sections(texts, "EXAMPLES")
	p.sections(texts, "NOTES")
	p.section("SEE ALSO")
	p.paragraph(reference(b.App.Name, "1") + ", " + reference(b.App.Name+"-run", "1") + ", " + reference(b.App.Name+"-jobs", "1"))
	return p.text.String(), nil
}
