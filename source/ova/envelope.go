package ova

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/text/encoding"

	"github.com/vddkcp/vddkcp/internal/charset"
)

// Bounds of a descriptor. Real ones, with the licences of a product in a dozen
// languages, are 2 MiB at most, and ten elements deep.
const (
	maxDescriptor = 16 << 20 // bytes
	maxTag        = 1 << 20  // bytes of one tag; a text may be as long as the descriptor
	maxDepth      = 64
	maxElements   = 100_000
	maxFiles      = 4096
	maxDisks      = 4096
)

// envelope is what a descriptor says of disks (DSP0243 1.1, sections 7.1 and
// 9.1; versions 0.9 and 2 differ in nothing that is read here but namespaces).
type envelope struct {
	files map[string]file // by id
	disks []disk
	// systems has the id of the virtual system that uses a disk, by diskId.
	systems map[string]string
	// encoding is that of the descriptor, nil for UTF-8.
	encoding encoding.Encoding
}

// file is an element File of References.
type file struct {
	href, compression string
	size              int64 // bytes; 0: not told
	chunkSize         int64 // bytes; 0: not in chunks
}

// disk is an element Disk of the DiskSection.
type disk struct {
	line           int
	id, fileRef    string // fileRef "": an empty disk
	format, parent string
	capacity       int64 // bytes; 0: not told, or by a property
	unit           int64 // bytes, that capacity is a multiple of
	odd            error // why the capacity is not known, though it is told
}

// parseEnvelope reads a descriptor. Namespaces are taken as they come: versions
// 0.9, 1 and 2 have different ones, and some writers leave them out. There is
// no document type and there are no entities but XML's own five.
func parseEnvelope(text []byte) (*envelope, error) {
	text = bytes.TrimPrefix(text, []byte("\ufeff"))
	if bytes.HasPrefix(text, []byte{0xfe, 0xff}) || bytes.HasPrefix(text, []byte{0xff, 0xfe}) {
		return nil, errors.New("the encoding is UTF-16, which is not read: want UTF-8")
	}
	if err := checkTags(text); err != nil {
		return nil, err
	}
	d := xml.NewDecoder(bytes.NewReader(text))
	p := &parser{
		decoder:  d,
		envelope: &envelope{files: map[string]file{}, systems: map[string]string{}},
		diskIDs:  map[string]int{},
	}
	d.CharsetReader = func(name string, in io.Reader) (io.Reader, error) {
		if strings.EqualFold(name, "us-ascii") || strings.EqualFold(name, "ascii") {
			return in, nil
		}
		if e, ok := charset.Get(name); ok {
			p.envelope.encoding = e
			return e.NewDecoder().Reader(in), nil
		}
		return nil, fmt.Errorf("the encoding %s is not read: want UTF-8, or an encoding of one byte per character, such as windows-1252", show(name))
	}
	for {
		t, err := d.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		if err := p.token(t); err != nil {
			return nil, fmt.Errorf("line %d: %w", p.line(), err)
		}
	}
	if p.elements == 0 {
		return nil, errors.New("there is no XML element in it, want an OVF Envelope")
	}
	for _, x := range p.envelope.disks {
		if _, ok := p.envelope.files[x.fileRef]; !ok && x.fileRef != "" {
			return nil, fmt.Errorf("line %d: disk %s has the fileRef %s, and no File has that id", x.line, show(x.id), show(x.fileRef))
		}
	}
	return p.envelope, nil
}

// checkTags bounds the length of each tag, and so the attributes that the XML
// decoder collects for one element. Texts, comments and CDATA sections cost no
// more than their bytes. The encodings that are read agree with ASCII in all
// characters that matter here.
func checkTags(text []byte) error {
	for rest := text; ; {
		i := bytes.IndexByte(rest, '<')
		if i < 0 {
			return nil
		}
		rest = rest[i:]
		end := ">"
		switch {
		case bytes.HasPrefix(rest, []byte("<!--")):
			end = "-->"
		case bytes.HasPrefix(rest, []byte("<![CDATA[")):
			end = "]]>"
		case bytes.HasPrefix(rest, []byte("<?")):
			end = "?>"
		default:
			n := tagLength(rest)
			if n > maxTag {
				line := 1 + bytes.Count(text[:len(text)-len(rest)], []byte("\n"))
				return fmt.Errorf("line %d: a tag of more than %d bytes", line, maxTag)
			}
			rest = rest[n:]
			continue
		}
		i = bytes.Index(rest, []byte(end))
		if i < 0 {
			return nil // the decoder says what is wrong
		}
		rest = rest[i+len(end):]
	}
}

// tagLength is the length of the tag that text begins with, in bytes. A > in a
// quoted value does not end it.
func tagLength(text []byte) int {
	quote := byte(0)
	for i, c := range text {
		switch {
		case quote != 0:
			if c == quote {
				quote = 0
			}
		case c == '"' || c == '\'':
			quote = c
		case c == '>':
			return i + 1
		}
	}
	return len(text)
}

// parser collects an envelope from tokens.
type parser struct {
	decoder  *xml.Decoder
	envelope *envelope

	namespace string   // of the root
	path      []string // local names of the open elements, "" of foreign ones
	elements  int
	diskIDs   map[string]int // the line of each

	system    string // the virtual system that is open
	systemEnd int    // the depth where it ends
	host      *strings.Builder
}

func (p *parser) line() int {
	line, _ := p.decoder.InputPos()
	return line
}

func (p *parser) token(t xml.Token) error {
	switch t := t.(type) {
	case xml.Directive:
		// Entities that grow, or that name files of this host, begin here.
		word, _, _ := strings.Cut(string(t[:min(len(t), 20)]), " ")
		return fmt.Errorf("a document type (<!%s) is not allowed in an OVF descriptor", word)
	case xml.StartElement:
		return p.start(t)
	case xml.EndElement:
		if p.host != nil && t.Name.Local == "HostResource" {
			// "ovf:/disk/ID", "/disk/ID" in version 0.9.
			if _, id, ok := strings.Cut(strings.TrimSpace(p.host.String()), "/disk/"); ok {
				p.envelope.systems[id] = p.system
			}
			p.host = nil
		}
		p.path = p.path[:len(p.path)-1]
		if len(p.path) < p.systemEnd {
			p.system, p.systemEnd = "", 0
		}
	case xml.CharData:
		if p.host != nil && p.host.Len()+len(t) <= maxName {
			p.host.Write(t)
		}
	}
	return nil
}

func (p *parser) start(t xml.StartElement) error {
	if p.elements++; p.elements > maxElements {
		return fmt.Errorf("more than %d elements", maxElements)
	}
	if len(p.path) == maxDepth {
		return fmt.Errorf("elements more than %d deep", maxDepth)
	}
	if len(p.path) == 0 {
		if p.elements > 1 {
			return fmt.Errorf("a second root element %s", show(t.Name.Local))
		}
		if t.Name.Local != "Envelope" {
			return fmt.Errorf("the root element is %s, want an OVF Envelope", show(t.Name.Local))
		}
		p.namespace = t.Name.Space
	}
	name := ""
	if p.isOVF(t.Name.Space) {
		name = t.Name.Local
	}
	if name == "Section" || name == "Content" {
		name = typeName(t, name)
	}
	p.path = append(p.path, name)
	switch {
	case p.in("Envelope", "References", "File"):
		return p.file(t)
	case p.in("Envelope", "DiskSection", "Disk"):
		return p.disk(t)
	case name == "VirtualSystem":
		a, err := p.attributes(t)
		p.system, p.systemEnd = a["id"], len(p.path)
		return err
	case t.Name.Local == "HostResource" && p.system != "":
		p.host = new(strings.Builder)
	}
	return nil
}

// typeName is the name of a Section or Content of version 0.9, which only its
// xsi:type tells ("ovf:DiskSection_Type").
func typeName(t xml.StartElement, name string) string {
	for _, a := range t.Attr {
		if a.Name.Local == "type" {
			_, local, ok := strings.Cut(a.Value, ":")
			if !ok {
				local = a.Value
			}
			return strings.TrimSuffix(local, "_Type")
		}
	}
	return name
}

// in reports whether the element that was opened last is at that path.
func (p *parser) in(path ...string) bool {
	if len(p.path) != len(path) {
		return false
	}
	for i, name := range path {
		if p.path[i] != name {
			return false
		}
	}
	return true
}

// isOVF reports whether an element or attribute of that namespace is OVF's:
// that of the root, none, or one of the known kind. An undeclared prefix is
// its own namespace.
func (p *parser) isOVF(space string) bool {
	return space == "" || space == p.namespace || space == "ovf" ||
		strings.Contains(space, "/ovf/") && strings.Contains(space, "envelope")
}

// attributes returns OVF's attributes of an element.
func (p *parser) attributes(t xml.StartElement) (map[string]string, error) {
	values := map[string]string{}
	for _, a := range t.Attr {
		if !p.isOVF(a.Name.Space) {
			continue
		}
		if _, ok := values[a.Name.Local]; ok {
			return nil, fmt.Errorf("%s has the attribute %s twice", t.Name.Local, show(a.Name.Local))
		}
		values[a.Name.Local] = a.Value
	}
	return values, nil
}

func (p *parser) file(t xml.StartElement) error {
	a, err := p.attributes(t)
	if err != nil {
		return err
	}
	id := a["id"]
	if id == "" { // no disk can name it
		return nil
	}
	if _, ok := p.envelope.files[id]; ok {
		return fmt.Errorf("a second File with the id %s", show(id))
	}
	if len(p.envelope.files) == maxFiles {
		return fmt.Errorf("more than %d Files", maxFiles)
	}
	f := file{href: a["href"], compression: a["compression"]}
	// ovftool takes any size and warns; writers put 0 and -1 for what they
	// don't know.
	if n, err := strconv.ParseInt(a["size"], 10, 64); err == nil && n > 0 {
		f.size = n
	}
	if s := a["chunkSize"]; s != "" {
		if f.chunkSize, err = strconv.ParseInt(s, 10, 64); err != nil || f.chunkSize <= 0 {
			return fmt.Errorf("the File %s has the chunkSize %s, want a number of bytes", show(id), show(s))
		}
	}
	p.envelope.files[id] = f
	return nil
}

func (p *parser) disk(t xml.StartElement) error {
	a, err := p.attributes(t)
	if err != nil {
		return err
	}
	d := disk{line: p.line(), id: a["diskId"], fileRef: a["fileRef"], format: a["format"], parent: a["parentRef"]}
	if d.id != "" {
		if line, ok := p.diskIDs[d.id]; ok {
			return fmt.Errorf("a second Disk with the diskId %s, the first is in line %d", show(d.id), line)
		}
		p.diskIDs[d.id] = d.line
	}
	if len(p.envelope.disks) == maxDisks {
		return fmt.Errorf("more than %d Disks", maxDisks)
	}
	if d.capacity, d.unit, d.odd = capacity(a["capacity"], a["capacityAllocationUnits"]); d.odd != nil {
		d.capacity, d.unit = 0, 1
	}
	p.envelope.disks = append(p.envelope.disks, d)
	return nil
}

var (
	// programmatic are units by DSP0004's grammar: "byte * 2^30".
	programmatic = regexp.MustCompile(`^byte((?:\s*\*\s*\d+(?:\s*\^\s*\d+)?)*)$`)
	factor       = regexp.MustCompile(`(\d+)(?:\s*\^\s*(\d+))?`)
	property     = regexp.MustCompile(`^\$\{.*\}$`)
)

// unitNames are units in words, as version 0.9 had them for memory and some
// writers have them for disks. They mean powers of 1024 there.
var unitNames = map[string]int64{
	"": 1, "bytes": 1, "kilobytes": 1 << 10, "megabytes": 1 << 20, "gigabytes": 1 << 30, "terabytes": 1 << 40,
	"kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40,
}

// capacity returns a capacity in bytes, and its unit. It is 0 where it is
// missing, 0, or left to a property ("${size}"), which is asked for when the
// appliance is deployed.
func capacity(number, units string) (n, unit int64, err error) {
	normal := strings.ToLower(strings.TrimSpace(units))
	unit, ok := unitNames[normal]
	if m := programmatic.FindStringSubmatch(normal); !ok && m != nil {
		unit, ok = product(m[1])
	}
	if !ok {
		return 0, 0, fmt.Errorf("capacityAllocationUnits is %s, want \"byte\", \"byte * 2^20\" and the like", show(units))
	}
	number = strings.TrimSpace(number)
	if number == "" || property.MatchString(number) {
		return 0, unit, nil
	}
	n, err = strconv.ParseInt(number, 10, 64)
	if err != nil || n < 0 {
		return 0, 0, fmt.Errorf("capacity is %s, want a number", show(number))
	}
	if n > math.MaxInt64/unit {
		return 0, 0, fmt.Errorf("a capacity of %d times %d bytes is more than 8 EiB", n, unit)
	}
	return n * unit, unit, nil
}

// product multiplies factors such as "* 2^10 * 3"; ok is false where it is 0
// or more than fits.
func product(factors string) (n int64, ok bool) {
	n = 1
	for _, m := range factor.FindAllStringSubmatch(factors, -1) {
		base, err := strconv.ParseInt(m[1], 10, 64)
		power := int64(1)
		if err == nil && m[2] != "" {
			power, err = strconv.ParseInt(m[2], 10, 64)
		}
		if err != nil || base == 0 || power > 64 {
			return 0, false
		}
		for range power {
			if n > math.MaxInt64/base {
				return 0, false
			}
			n *= base
		}
	}
	return n, true
}

// show quotes what an appliance says, for errors.
func show(s string) string {
	if len(s) > 100 {
		return strconv.Quote(s[:100]) + "..."
	}
	return strconv.Quote(s)
}
