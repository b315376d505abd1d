package server

import "fmt"

// Leaks describes the resources that the server still holds for connections. It returns "" if
// there are none.
func (s *Server) Leaks() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.memory.mu.Lock()
	defer s.memory.mu.Unlock()
	m := s.memory
	if m.used == 0 && len(m.waiting) == 0 && len(s.conns) == 0 && len(s.peers) == 0 && len(s.open) == 0 && s.evicted == 0 && s.clients.Load() == 0 && s.cacheBytes.Load() == 0 {
		return ""
	}
	return fmt.Sprintf("%d bytes, %d waiting, %d connections (%d evicted, %d with an export) of %d peers, %d exports open with %d bytes of extents",
		m.used, len(m.waiting), len(s.conns), s.evicted, s.clients.Load(), len(s.peers), len(s.open), s.cacheBytes.Load())
}
