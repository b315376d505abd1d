package profile

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/certificate"
	"github.com/vddkcp/vddkcp/internal/nearest"
	"github.com/vddkcp/vddkcp/internal/secret"
)

// maxFile is the largest size of a configuration file in bytes.
const maxFile = 1 << 20

// settings are the keys of a profile in a configuration file. The struct has the values as the file
// has them. A key that the file does not have is the zero value.
type settings struct {
	Server      string `json:"server"`
	User        string `json:"user,omitempty"`
	Password    string `json:"password,omitempty"`
	Cookie      string `json:"cookie,omitempty"`
	Thumbprint  string `json:"thumbprint,omitempty"`
	Port        uint32 `json:"port,omitempty"`
	NFCHostPort uint32 `json:"nfchostport,omitempty"`
	LibDir      string `json:"libdir,omitempty"`
	Via         string `json:"via,omitempty"`
}

var settingNames = []string{"server", "user", "password", "cookie", "thumbprint", "port", "nfchostport", "libdir", "via"}

// The type file is the content of a configuration file. profiles and settings have the same order,
// that of the file.
type file struct {
	profiles []*Profile
	settings []settings
}

func (f *file) find(name string) *Profile {
	for _, p := range f.profiles {
		if p.Name == name {
			return p
		}
	}
	return nil
}

func (f *file) names() (names []string) {
	for _, p := range f.profiles {
		names = append(names, p.Name)
	}
	return names
}

// The function load reads the configuration file at the given path. If there is no such file, or the
// path is "", the result has no profiles.
func load(path string) (*file, error) {
	if path == "" {
		return new(file), nil
	}
	// With O_NONBLOCK, opening a FIFO does not wait for a process that writes to it.
	opened, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return new(file), nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the configuration file: %w", err)
	}
	defer opened.Close()
	info, err := opened.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: the configuration file is not a regular file", path)
	}
	text, err := io.ReadAll(io.LimitReader(opened, maxFile+1))
	if err != nil {
		return nil, err
	}
	f, err := parse(text, path)
	if err != nil {
		return nil, err
	}
	for _, p := range f.profiles {
		p.access = access{mode: info.Mode()}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			p.access.owner = st.Uid
		}
	}
	return f, nil
}

// The function parse parses the text of the configuration file at the given path. Its errors name the
// file, the line and the key. They contain no value of a password or a cookie.
func parse(text []byte, path string) (*file, error) {
	p := &parser{text: text, path: path}
	switch {
	case len(text) > maxFile:
		return nil, fmt.Errorf("%s: the configuration file is larger than %d bytes", path, maxFile)
	case bytes.HasPrefix(text, []byte("\ufeff")):
		return nil, p.bad(0, "", "a byte order mark, which JSON does not allow: save the file as UTF-8 without it")
	case !utf8.Valid(text):
		return nil, p.bad(invalidUTF8(text), "", "not UTF-8")
	case len(bytes.TrimSpace(text)) == 0:
		return nil, p.bad(0, "", `empty: want an object such as {"servers": {}}`)
	}
	var syntax *json.SyntaxError
	if err := json.Unmarshal(text, new(json.RawMessage)); errors.As(err, &syntax) {
		return nil, p.bad(int(max(syntax.Offset-1, 0)), "", "%s", syntaxMessage(syntax))
	} else if err != nil {
		return nil, p.bad(0, "", "%w", err)
	}
	p.tokens = json.NewDecoder(bytes.NewReader(text))
	p.tokens.UseNumber()
	f := new(file)
	err := p.object("", []string{"servers"}, func(_, servers string) error {
		return p.object(servers, nil, func(name, field string) error { return p.profile(f, name, field) })
	})
	if err != nil {
		return nil, err
	}
	return f, nil
}

// syntaxMessage returns the text of a syntax error without the character that was found, which may be
// a part of a password.
func syntaxMessage(err *json.SyntaxError) string {
	if _, where, ok := strings.Cut(err.Error(), "invalid character "); ok {
		if _, where, ok = strings.Cut(where, "' "); ok {
			return "an invalid character " + where
		}
	}
	return err.Error()
}

func invalidUTF8(text []byte) int {
	for i := 0; i < len(text); {
		r, n := utf8.DecodeRune(text[i:])
		if r == utf8.RuneError && n == 1 {
			return i
		}
		i += n
	}
	return len(text)
}

// The type parser parses the tokens of a text, which is valid JSON.
type parser struct {
	path   string
	text   []byte
	tokens *json.Decoder
	start  int // offset in bytes at which the last token begins
}

// The method bad returns an error that names the place of a mistake. offset is the offset in bytes of
// the mistake, and field is the key, such as servers.vc1.port, or "".
func (p *parser) bad(offset int, field, format string, args ...any) error {
	before := p.text[:min(offset, len(p.text))]
	line := bytes.Count(before, []byte("\n")) + 1
	column := utf8.RuneCount(before[bytes.LastIndexByte(before, '\n')+1:]) + 1
	if field != "" {
		field += ": "
	}
	return fmt.Errorf("%s:%d:%d: %s%w", p.path, line, column, field, fmt.Errorf(format, args...))
}

// The method next returns the next token.
func (p *parser) next() (json.Token, error) {
	at := int(p.tokens.InputOffset())
	for at < len(p.text) && strings.IndexByte(" \t\r\n,:", p.text[at]) >= 0 {
		at++
	}
	p.start = at
	token, err := p.tokens.Token()
	if err != nil {
		return nil, p.bad(at, "", "%w", err) // does not happen, because the text is valid JSON
	}
	return token, nil
}

// The method object parses an object. For each key, it calls the function member, which parses the
// value. The parameter name of this function is the key, and field is the place of the key, such as
// servers.vc1.port. known has the allowed keys; nil means that all names of profiles are allowed.
func (p *parser) object(field string, known []string, member func(name, field string) error) error {
	token, err := p.next()
	if err != nil {
		return err
	}
	if token != json.Delim('{') {
		return p.bad(p.start, field, "found %s, want an object", kindOf(token))
	}
	seen := map[string]bool{}
	for p.tokens.More() {
		token, err := p.next()
		if err != nil {
			return err
		}
		name, _ := token.(string)
		full := quoted(name)
		if field != "" {
			full = field + "." + full
		}
		switch {
		case seen[name]:
			return p.bad(p.start, full, "the key occurs twice")
		case known == nil:
			if err := CheckName(name); err != nil {
				return p.bad(p.start, field, "%w", err)
			}
		case !slices.Contains(known, name):
			message := "unknown key"
			if near, ok := nearest.Near(strings.ToLower(name), known); ok {
				message += fmt.Sprintf("; did you mean %q?", near)
			} else {
				message += fmt.Sprintf("; the keys are %s", strings.Join(known, ", "))
			}
			return p.bad(p.start, full, "%s", message)
		}
		seen[name] = true
		if err := member(name, full); err != nil {
			return err
		}
	}
	_, err = p.next()
	return err
}

// The function quoted returns a key for a message. A key with unusual characters is in quotes.
func quoted(key string) string {
	if CheckName(key) != nil {
		return strconv.Quote(key[:min(len(key), maxName)])
	}
	return key
}

// kindOf describes a JSON value without showing it, because it may be a secret.
func kindOf(token json.Token) string {
	switch token := token.(type) {
	case json.Delim:
		if token == '[' {
			return "an array"
		}
		return "an object"
	case string:
		return "a string"
	case json.Number:
		return "a number"
	case bool:
		return "true or false"
	}
	return "null"
}

// The method profile parses the profile with the given name and appends it to f.
func (p *parser) profile(f *file, name, field string) error {
	begin := int(p.tokens.InputOffset())
	var s settings
	err := p.object(field, settingNames, func(name, field string) error { return p.setting(&s, name, field) })
	if err != nil {
		return err
	}
	if s.Server == "" {
		return p.bad(begin, field, `the key "server" is missing`)
	}
	f.profiles = append(f.profiles, s.profile(name, p.path))
	f.settings = append(f.settings, s)
	return nil
}

// The method setting parses the value of the key with the given name.
func (p *parser) setting(s *settings, name, field string) error {
	token, err := p.next()
	if err != nil {
		return err
	}
	switch name {
	case "port":
		s.Port, err = portOf(token)
	case "nfchostport":
		s.NFCHostPort, err = portOf(token)
	default:
		text, ok := token.(string)
		if !ok {
			err = fmt.Errorf("found %s, want a string", kindOf(token))
			break
		}
		*s.text(name), err = text, checkText(name, text)
	}
	if err != nil {
		return p.bad(p.start, field, "%w", err)
	}
	return nil
}

// The method text returns the field for a key whose value is a string.
func (s *settings) text(name string) *string {
	switch name {
	case "server":
		return &s.Server
	case "user":
		return &s.User
	case "password":
		return &s.Password
	case "cookie":
		return &s.Cookie
	case "thumbprint":
		return &s.Thumbprint
	case "via":
		return &s.Via
	}
	return &s.LibDir
}

func portOf(token json.Token) (uint32, error) {
	number, ok := token.(json.Number)
	if !ok {
		return 0, fmt.Errorf("found %s, want a port number from 1 to 65535", kindOf(token))
	}
	n, err := strconv.ParseUint(number.String(), 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%.40s: want a port number from 1 to 65535", number)
	}
	return uint32(n), nil
}

// checkText checks the value of a key. Its errors contain no secret.
func checkText(name, text string) error {
	switch {
	case text == "":
		return errors.New("the value is empty: leave the key out, or write a value")
	case strings.ContainsFunc(text, unicode.IsControl):
		return errors.New("the value has a control character")
	}
	switch name {
	case "server":
		return CheckServer(text)
	case "thumbprint":
		_, err := certificate.ParseThumbprint(text)
		return err
	case "via":
		if !slices.Contains(Vias, text) {
			return fmt.Errorf("%.40q: want %s", text, strings.Join(Vias, ", "))
		}
	case "password", "cookie":
		if text == "+" {
			return errors.New(`the value "+": the path of a file is missing after the "+"`)
		}
		if strings.HasPrefix(text, "-") {
			return fmt.Errorf("the value begins with \"-\": a profile has the %s itself, or +FILE for the first line of a file", name)
		}
	}
	return nil
}

// The method profile returns the profile with the given name and settings, in the configuration file
// at the given path. Relative paths in the settings start from the folder of this file.
func (s *settings) profile(name, path string) *Profile {
	dir := filepath.Dir(path)
	absolute := func(path string) string {
		if path == "" || filepath.IsAbs(path) {
			return path
		}
		return strings.TrimSuffix(dir, "/") + "/" + path // not cleaned: ".." after a symbolic link must stay
	}
	where := func(text string) Secret {
		if path, ok := strings.CutPrefix(text, "+"); ok {
			return Secret{File: absolute(path)}
		}
		if text == "" {
			return Secret{}
		}
		return Secret{Text: secret.New(text)}
	}
	return &Profile{
		Name: name, File: path, Server: s.Server, User: s.User, Thumbprint: s.Thumbprint, Port: s.Port, NFCHostPort: s.NFCHostPort,
		LibDir: absolute(s.LibDir), Via: s.Via, Password: where(s.Password), Cookie: where(s.Cookie),
	}
}
