package main

import (
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/alecthomas/kong"

	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/nbd"
)

// nbdkitFilters are the filters of nbdkit that vddkcp does not need, because it does the
// same work itself. The map also contains the parameters that each filter accepts. If
// vddkcp has no flag for a parameter, the parameter is accepted and ignored, because vddkcp
// chooses a suitable value itself.
var nbdkitFilters = map[string][]string{
	"blocksize":    {"minblock", "maxdata", "maxlen"},
	"cacheextents": nil,
	"cow":          {"cow-block-size", "cow-on-cache", "cow-on-read"},
	"exitlast":     nil,
	"multi-conn":   {"multi-conn-mode", "multi-conn-track-dirty", "multi-conn-exportname"},
	"readahead":    nil,
	"retry":        {"retries", "retry-delay", "retry-exponential", "retry-readonly"},
}

// nbdkitOptions maps long options of nbdkit that vddkcp does not accept to the
// short options to use instead.
var nbdkitOptions = map[string]string{
	"foreground": "-f", "no-fork": "-f", "readonly": "-r", "read-only": "-r", "unix": "-U", "ipaddr": "-i", "ip-addr": "-i",
	"exportname": "-e", "export-name": "-e", "pidfile": "-P", "threads": "-t",
}

// rewriteNBDKit rewrites a command line of export that was written for nbdkit, see
// docs/cli.md. It replaces the options and filters of nbdkit by flags of vddkcp. It
// removes the word vddk, which is the name of a plugin of nbdkit. The command lines of
// other commands are returned unchanged.
func rewriteNBDKit(app *kong.Application, args []string) ([]string, error) {
	if len(args) == 0 || args[0] != "export" {
		return args, nil
	}
	l := &nbdkitLine{commandLine: commandLine{command: commandNamed(app, "export")}, filters: map[string]bool{}}
	for rest := args[1:]; len(rest) > 0; {
		var err error
		if rest, err = l.parseWord(rest); err != nil {
			return nil, err
		}
	}
	return l.translate()
}

// nbdkitLine is a command line as nbdkit interprets it.
type nbdkitLine struct {
	commandLine
	port, address string
	filters       map[string]bool
}

// parseWord interprets the first of the given words of a command line. If this word is an
// option whose value is the second word, it interprets both. It returns the remaining
// words.
func (l *nbdkitLine) parseWord(words []string) (rest []string, err error) {
	word, rest := words[0], words[1:]
	switch {
	case word == "--":
		l.operands = append(l.operands, rest...)
		return nil, nil
	case strings.HasPrefix(word, "--"):
		return l.long(word, rest)
	case strings.HasPrefix(word, "-") && word != "-":
		return l.short(word[1:], rest)
	}
	l.operands = append(l.operands, word)
	return rest, nil
}

func (l *nbdkitLine) long(word string, rest []string) ([]string, error) {
	name, value, valued := strings.Cut(word[2:], "=")
	flag := l.find(func(f *kong.Flag) bool { return f.Name == name })
	next := func() error {
		if !valued && len(rest) == 0 {
			return usage.Errorf("--%s: the value is missing", name)
		}
		if !valued {
			value, rest = rest[0], rest[1:]
		}
		return nil
	}
	switch {
	case name == "filter":
		if err := next(); err != nil {
			return nil, err
		}
		return rest, l.filter(value)
	case name == "tls-psk":
		return nil, usage.New("--tls-psk: pre-shared keys are not supported (Go's TLS has none)", "use --tls-certificates DIR; to check certificates of clients, also use --tls-verify-peer")
	case name == "port" && len(l.operands) > 0 && l.operands[0] == "vddk":
		return nil, usage.New("--port is ambiguous: it is the port to listen on for nbdkit, and the port of the VMware server for vddkcp", "use -p N for the port to listen on, and port=N for the port of the server")
	case flag == nil && nbdkitOptions[name] != "":
		return nil, usage.New(fmt.Sprintf("--%s: vddkcp accepts only the short form of this option of nbdkit", name), "use "+nbdkitOptions[name])
	case flag == nil:
		return nil, usage.New(fmt.Sprintf("unknown flag --%s", name), "vddkcp export --help lists the flags")
	case !flag.IsBool() && !valued:
		if err := next(); err != nil {
			return nil, err
		}
		word += "=" + value
	}
	l.flags = append(l.flags, word)
	return rest, nil
}

// The method short interprets a word that consists of short options, such as -rf. The
// parameter letters is this word without its hyphen. The parameter rest contains the words
// that follow it, of which the first may be the value of an option. The result contains the
// words that were not interpreted.
func (l *nbdkitLine) short(letters string, rest []string) ([]string, error) {
	for i, letter := range letters {
		after := letters[i+len(string(letter)):]
		switch letter {
		case 'r', 'f': // vddkcp is read-only and stays in the foreground by default
			if letter == 'r' {
				l.note("r")
			}
			continue
		case 'U', 'p', 'i', 'e', 'P', 't':
			value := after
			if value == "" {
				if len(rest) == 0 {
					return nil, usage.Errorf("option -%c: the value is missing", letter)
				}
				value, rest = rest[0], rest[1:]
			}
			return rest, l.valued(letter, value)
		}
		flag := l.find(func(f *kong.Flag) bool { return f.Short == letter })
		switch {
		case flag == nil:
			return nil, usage.New(fmt.Sprintf("-%c: vddkcp export does not accept this option of nbdkit", letter), "vddkcp export --help lists the flags")
		case flag.IsBool():
			l.flags = append(l.flags, "-"+string(letter))
			continue
		}
		value := after
		if value == "" && len(rest) > 0 {
			value, rest = rest[0], rest[1:]
		}
		l.flags = append(l.flags, "--"+flag.Name+"="+value)
		return rest, nil
	}
	return rest, nil
}

// The method valued handles an option of nbdkit that has a value.
func (l *nbdkitLine) valued(letter rune, value string) error {
	switch letter {
	case 'U':
		l.flags = append(l.flags, "--listen=unix:"+value)
	case 'p':
		l.port = value
	case 'i':
		l.address = value
	case 'e':
		l.flags = append(l.flags, "--name="+value)
	case 'P':
		l.flags = append(l.flags, "--pid-file="+value)
	case 't':
		// The number of threads is ignored: vddkcp processes as many requests as
		// clients send.
		if strings.Trim(value, "0123456789") != "" {
			return usage.Errorf("-t %s: want a number of threads", value)
		}
	}
	return nil
}

func (l *nbdkitLine) filter(name string) error {
	if _, ok := nbdkitFilters[name]; !ok {
		var known []string
		for k := range nbdkitFilters {
			known = append(known, k)
		}
		slices.Sort(known)
		return usage.Errorf("--filter=%s: vddkcp does not support this filter; it supports %s", name, strings.Join(known, ", "))
	}
	l.filters[name] = true
	switch name {
	case "exitlast":
		l.flags = append(l.flags, "--exit-last")
	case "cow":
		l.flags = append(l.flags, "--cow")
	}
	return nil
}

// The method note records that the command line has the option with the given name.
func (l *nbdkitLine) note(name string) {
	if l.has == nil {
		l.has = map[string]bool{}
	}
	l.has[name] = true
}

// The method translate returns the command line with the flags of vddkcp in place of the
// options of nbdkit.
func (l *nbdkitLine) translate() ([]string, error) {
	if l.port != "" || l.address != "" {
		if l.port == "" {
			l.port = nbd.DefaultPort
		}
		if l.address == "" {
			l.address = "127.0.0.1"
		}
		l.flags = append(l.flags, "--listen=tcp://"+net.JoinHostPort(l.address, l.port))
	}
	if l.has["r"] && slices.Contains(l.flags, "--rw") {
		return nil, usage.Errorf("-r and --rw exclude each other: -r makes the disks read-only")
	}
	if len(l.operands) > 0 && l.operands[0] == "vddk" {
		l.operands = l.operands[1:]
	}
	var words []string
	for _, word := range l.operands {
		key, value, _ := strings.Cut(word, "=")
		filter := ""
		for name, keys := range nbdkitFilters {
			if l.filters[name] && keyValue.MatchString(word) && slices.Contains(keys, key) {
				filter = name
			}
		}
		switch {
		case filter == "":
			words = append(words, word)
		case key == "retries":
			l.flags = append(l.flags, "--retries="+value)
		case key == "cow-on-read":
			on, err := nbdkitBool(value)
			if err != nil {
				return nil, usage.Errorf("%s=: %w", key, err)
			}
			l.flags = append(l.flags, fmt.Sprintf("--cow-on-read=%t", on))
		}
	}
	line := append([]string{"export"}, l.flags...)
	if len(words) > 0 {
		line = append(append(line, "--"), words...)
	}
	return line, nil
}
