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

// These constants limit what a descriptor may contain. Real descriptors have at most 2
// MiB, even if they include the licences of a product in a dozen languages. The elements
// of real descriptors are nested at most ten deep.
const (
	maxDescriptor = 16 << 20 // bytes
	maxTag        = 1 << 20  // bytes in one tag; a text may be as long as the descriptor
	maxDepth      = 64       // levels of nested elements
	maxElements   = 100_000
	maxFiles      = 4096
	maxDisks      = 4096
)

// envelope has the parts of a descriptor that describe disks (DSP0243 1.1, sections 7.1
// and 9.1). Descriptors of the versions 0.9 and 2 have the same parts with other
// namespaces. In version 0.9, some elements also have other names (see typeName).
type envelope struct {
	files    map[string]file // by id
	disks    []disk
	systems  map[string]string // ids of the virtual systems that use the disks, by diskId
	encoding encoding.Encoding // encoding of the descriptor; nil: UTF-8
}

// file has the content of an element File in the section References.
type file struct {
	href, compression string
	size              int64 // bytes; 0: not recorded
	chunkSize         int64 // bytes; 0: the file is not split into chunks
}

// disk has the content of an element Disk in the DiskSection.
type disk struct {
	line           int    // line of the descriptor
	id, fileRef    string // fileRef is "" for an empty disk
	format, parent string
	capacity       int64 // bytes; 0: not recorded, or left to a property
	unit           int64 // bytes; the capacity is a multiple of it
	odd            error // why the recorded capacity cannot be understood
}

// parseEnvelope parses a descriptor. It accepts elements of the versions 0.9, 1 and 2,
// which have different namespaces. It also accepts elements without a namespace,
// because some writers leave it out. It returns an error for a document type
// declaration (<!DOCTYPE). A descriptor can therefore use only the five entities that
// XML predefines.
func parseEnvelope(text []byte) (*envelope, error) {
	text = bytes.TrimPrefix(text, []byte("\ufeff"))
	if bytes.HasPrefix(text, []byte{0xfe, 0xff}) || bytes.HasPrefix(text, []byte{0xff, 0xfe}) {
		return nil, errors.New("the encoding is UTF-16, which is not supported: want UTF-8")
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
		return nil, fmt.Errorf("the encoding %s is not supported: want UTF-8, or an encoding of one byte per character, such as windows-1252", show(name))
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
		return nil, errors.New("the file has no XML element, want an OVF Envelope")
	}
	for _, x := range p.envelope.disks {
		if _, ok := p.envelope.files[x.fileRef]; !ok && x.fileRef != "" {
			return nil, fmt.Errorf("line %d: the disk %s has the fileRef %s, but the descriptor has no element File with this id", x.line, show(x.id), show(x.fileRef))
		}
	}
	return p.envelope, nil
}

// checkTags returns an error if a tag is longer than maxTag. This is necessary because
// the XML decoder keeps all attributes of an element in memory. Texts, comments and
// CDATA sections may be longer, because they do not need more memory than they have
// bytes.
//
// checkTags looks for characters such as < in the bytes as they are, before the
// character encoding is decoded. This is correct because all supported encodings have
// these characters at their ASCII codes.
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
				return fmt.Errorf("line %d: a tag has more than %d bytes", line, maxTag)
			}
			rest = rest[n:]
			continue
		}
		i = bytes.Index(rest, []byte(end))
		if i < 0 {
			return nil // the XML decoder reports the error
		}
		rest = rest[i+len(end):]
	}
}

// tagLength returns the length in bytes of the tag at the beginning of text. A
// character > in a quoted value of an attribute does not end the tag.
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

// parser builds an envelope from the XML tokens of a descriptor.
type parser struct {
	decoder  *xml.Decoder
	envelope *envelope

	namespace string         // namespace of the root element
	path      []string       // local names of the open elements; "" for elements that are not OVF's
	elements  int            // number of elements so far
	diskIDs   map[string]int // line numbers by diskId

	system    string           // id of the open VirtualSystem element; "": none is open
	systemEnd int              // depth of that element
	host      *strings.Builder // text of the open HostResource element; nil: none is open
}

func (p *parser) line() int {
	line, _ := p.decoder.InputPos()
	return line
}

func (p *parser) token(t xml.Token) error {
	switch t := t.(type) {
	case xml.Directive:
		// A declaration of a document type could define entities that expand without
		// bound, or that include files of the computer on which this program runs.
		word, _, _ := strings.Cut(string(t[:min(len(t), 20)]), " ")
		return fmt.Errorf("a document type (<!%s) is not allowed in an OVF descriptor", word)
	case xml.StartElement:
		return p.start(t)
	case xml.EndElement:
		if p.host != nil && t.Name.Local == "HostResource" {
			// If the HostResource is a disk, its text is "ovf:/disk/ID", or "/disk/ID"
			// in version 0.9.
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
		return fmt.Errorf("the descriptor has more than %d elements", maxElements)
	}
	if len(p.path) == maxDepth {
		return fmt.Errorf("the elements are nested more than %d deep", maxDepth)
	}
	if len(p.path) == 0 {
		if p.elements > 1 {
			return fmt.Errorf("there is a second root element %s", show(t.Name.Local))
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
	case p.atPath("Envelope", "References", "File"):
		return p.file(t)
	case p.atPath("Envelope", "DiskSection", "Disk"):
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

// typeName returns the name that an element Section or Content of version 0.9 has in
// later versions. The element has this name in its attribute xsi:type
// ("ovf:DiskSection_Type" means DiskSection).
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

// atPath reports whether the innermost open element has the given path, a list of element
// names that begins with the root.
func (p *parser) atPath(path ...string) bool {
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

// isOVF reports whether the elements and attributes of a namespace belong to OVF. This
// is so for the namespace of the root element, for no namespace, and for a namespace
// that looks like one of OVF. It is also so for the namespace "ovf": if the document
// uses the prefix "ovf" without declaring it, the XML decoder returns the prefix as the
// namespace.
func (p *parser) isOVF(space string) bool {
	return space == "" || space == p.namespace || space == "ovf" ||
		strings.Contains(space, "/ovf/") && strings.Contains(space, "envelope")
}

// The method attributes returns the values of the attributes of an element. It leaves
// out attributes that do not belong to OVF. The keys of the result are the names of the
// attributes.
func (p *parser) attributes(t xml.StartElement) (map[string]string, error) {
	values := map[string]string{}
	for _, a := range t.Attr {
		if !p.isOVF(a.Name.Space) {
			continue
		}
		if _, ok := values[a.Name.Local]; ok {
			return nil, fmt.Errorf("the element %s has the attribute %s twice", t.Name.Local, show(a.Name.Local))
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
	if id == "" { // no disk can refer to the file
		return nil
	}
	if _, ok := p.envelope.files[id]; ok {
		return fmt.Errorf("there is a second element File with the id %s", show(id))
	}
	if len(p.envelope.files) == maxFiles {
		return fmt.Errorf("the descriptor has more than %d elements File", maxFiles)
	}
	f := file{href: a["href"], compression: a["compression"]}
	// If a program that writes descriptors does not know the size of the file, it
	// writes 0 or -1 as the size. ovftool accepts a wrong size with a warning.
	if n, err := strconv.ParseInt(a["size"], 10, 64); err == nil && n > 0 {
		f.size = n
	}
	if s := a["chunkSize"]; s != "" {
		if f.chunkSize, err = strconv.ParseInt(s, 10, 64); err != nil || f.chunkSize <= 0 {
			return fmt.Errorf("the element File %s has the chunkSize %s, want a number of bytes", show(id), show(s))
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
			return fmt.Errorf("there is a second element Disk with the diskId %s; the first is in line %d", show(d.id), line)
		}
		p.diskIDs[d.id] = d.line
	}
	if len(p.envelope.disks) == maxDisks {
		return fmt.Errorf("the descriptor has more than %d elements Disk", maxDisks)
	}
	if d.capacity, d.unit, d.odd = capacity(a["capacity"], a["capacityAllocationUnits"]); d.odd != nil {
		d.capacity, d.unit = 0, 1
	}
	p.envelope.disks = append(p.envelope.disks, d)
	return nil
}

var (
	// programmatic matches units in the grammar of DSP0004: "byte * 2^30".
	programmatic = regexp.MustCompile(`^byte((?:\s*\*\s*\d+(?:\s*\^\s*\d+)?)*)$`)
	factor       = regexp.MustCompile(`(\d+)(?:\s*\^\s*(\d+))?`)
	property     = regexp.MustCompile(`^\$\{.*\}$`)
)

// unitNames are names of units with their sizes in bytes. Version 0.9 had them for
// memory, and some writers use them for disks. They mean powers of 1024.
var unitNames = map[string]int64{
	"": 1, "bytes": 1, "kilobytes": 1 << 10, "megabytes": 1 << 20, "gigabytes": 1 << 30, "terabytes": 1 << 40,
	"kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40,
}

// The function capacity returns a capacity and its unit, both in bytes. The returned
// capacity is 0 if the descriptor has no capacity or the capacity 0. It is also 0 if
// the descriptor has the name of a property ("${size}") instead, because the user
// chooses the value of the property later, when the appliance is deployed.
func capacity(number, units string) (n, unit int64, err error) {
	normal := strings.ToLower(strings.TrimSpace(units))
	unit, ok := unitNames[normal]
	if m := programmatic.FindStringSubmatch(normal); !ok && m != nil {
		unit, ok = product(m[1])
	}
	if !ok {
		return 0, 0, fmt.Errorf("capacityAllocationUnits is %s, want \"byte\", \"byte * 2^20\" or similar", show(units))
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
		return 0, 0, fmt.Errorf("the capacity of %d times %d bytes is more than 8 EiB", n, unit)
	}
	return n * unit, unit, nil
}

// The function product multiplies factors such as "* 2^10 * 3". The result ok is false
// if the product is 0 or does not fit into an int64.
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

// The function show quotes text of an appliance for a message. Only the first 100 bytes
// of a longer text are quoted.
func show(s string) string {
	if len(s) > 100 {
		return strconv.Quote(s[:100]) + "..."
	}
	return strconv.Quote(s)
}
