package vspheretest

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"

	"github.com/vmware/govmomi/vim25/soap"
)

// loggedIn tells the stand-in library of the cookie of a new session. Only with StrictLogin.
func (s *Server) loggedIn(answer *httptest.ResponseRecorder) {
	if !s.options.StrictLogin || s.options.LibDir == "" {
		return
	}
	for _, c := range (&http.Response{Header: answer.Header()}).Cookies() {
		if c.Name == soap.SessionCookieName {
			s.allowLogin(c.Value)
		}
	}
}

// allowLogin makes the stand-in library accept a cookie, and the user and password of the server.
func (s *Server) allowLogin(cookie string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	path := filepath.Join(s.options.LibDir, "vddktest.conf")
	text, err := os.ReadFile(path)
	s.must(err)
	var lines []string
	for line := range strings.Lines(string(text)) {
		key, _, _ := strings.Cut(line, " ")
		if key != "cookie" && key != "user" && key != "password" {
			lines = append(lines, strings.TrimSuffix(line, "\n"))
		}
	}
	lines = append(lines, "cookie "+cookie, "user "+s.User, "password "+s.Password, "")
	s.must(os.WriteFile(path+".vspheretest", []byte(strings.Join(lines, "\n")), 0o644))
	s.must(os.Rename(path+".vspheretest", path))
}
